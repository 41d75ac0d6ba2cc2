"""Exact pass@1, pass@k and gradient conflict, without sampling.

Only one string is right on a prompt, so p(x) = pi(answer, <eos> | x) is one product of token probabilities from one
teacher-forced forward pass, and so is its gradient. Everything the guard estimates from samples is known here:

    J_k        = mean_x 1 - (1 - p(x))^k
    grad J_k   = mean_x w_k(p(x)) grad p(x),   w_k(p) = k (1 - p)^(k-1)

Left out: temperature and top-p. p(x) is the success rate of plain sampling at temperature 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = Sequence[Mapping[str, str]]


def encode(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> tuple[Tensor, int]:
    """Token ids [B, 12] of prompt, answer and end-of-sequence, and the length of the prompt (7 for all rows)."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    answers = tokenizer([row["answer"] for row in rows])["input_ids"]
    ids = [p + a + [tokenizer.eos_token_id] for p, a in zip(prompts, answers, strict=True)]
    return torch.tensor(ids), len(prompts[0])


def success_probability(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> Tensor:
    """p(x) of each row, [B], differentiable with respect to the model."""
    ids, prompt_length = encode(tokenizer, rows)
    ids = ids.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, prompt_length - 1 : -1]  # [B, 5, V] of the next token
    log_probs = logits.float().log_softmax(-1)
    answer = ids[:, prompt_length:, None]  # [B, 5, 1]
    return log_probs.gather(-1, answer).sum((1, 2)).exp()


def pass_at_k(p: Tensor, k: int) -> Tensor:
    """J_k = mean of 1 - (1-p)^k over prompts, a scalar."""
    return (1 - (1 - p) ** k).mean()


@torch.no_grad()
def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, k: int) -> dict[str, float]:
    """Exact pass@1 and pass@k over all rows, and per kind: `pass_at_8`, `easy/pass_at_8`, ...

    Draws no random number and changes no mode, so that calling it in the middle of training leaves no trace.
    """
    p = success_probability(model, tokenizer, rows)
    kinds = [row["kind"] for row in rows]
    out = {f"pass_at_{j}": pass_at_k(p, j).item() for j in (1, k)}
    for kind in sorted(set(kinds)):
        mine = p[torch.tensor([name == kind for name in kinds])]
        out |= {f"{kind}/pass_at_{j}": pass_at_k(mine, j).item() for j in (1, k)}
    return out


def gradient_cosine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, ks: Sequence[int]
) -> dict[int, float]:
    """cos(grad J_k, grad J_1) over these rows for each k: exact, by one backward pass for J_1 and one for each k.

    `torch.autograd.grad` leaves every `.grad` as it was.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        p = success_probability(model, tokenizer, rows)
        unit_1 = _unit_gradient(pass_at_k(p, 1), parameters)
        return {k: (_unit_gradient(pass_at_k(p, k), parameters) @ unit_1).item() for k in ks}


def _unit_gradient(value: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    # Not torch.cosine_similarity: it takes any norm below 1e-8 for 1e-8, and w_8(p) is 1e-9 on solved prompts.
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)]).double()
    return gradient / gradient.norm()
