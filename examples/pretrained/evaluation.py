"""Exact pass rates, in all and by length of the word: one text is right on a prompt, so p(x) is one forward pass.

p(x) is the probability of the tokens that the tokenizer makes of the right text, and of end-of-sequence after them.
Other token sequences of the same text count as right when they are sampled, and are left out here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.pretrained.task import Row

BATCH = 32


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Right-padded input ids, mask and labels, each [B, longest]: labels are those of answer and end-of-sequence."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    answers = tokenizer([row["answer"] for row in rows])["input_ids"]
    whole = [prompt + answer + [tokenizer.eos_token_id] for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, whole))
    fill = [longest - len(ids) for ids in whole]
    return {
        "input_ids": torch.tensor([ids + [tokenizer.pad_token_id] * n for ids, n in zip(whole, fill, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * n for ids, n in zip(whole, fill, strict=True)]),
        "labels": torch.tensor(
            [
                [-100] * len(prompt) + ids[len(prompt) :] + [-100] * n
                for prompt, ids, n in zip(prompts, whole, fill, strict=True)
            ]
        ),
    }


@torch.no_grad()
def success_probability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch: int = BATCH
) -> Tensor:
    """p(x) of each row, [m] float64, at temperature 1. No random number is drawn and the mode comes back."""
    found = []
    with evaluating(model):
        for start in range(0, len(rows), batch):
            inputs = {name: x.to(model.device) for name, x in encode(tokenizer, rows[start : start + batch]).items()}
            labels = inputs.pop("labels")[:, 1:]
            log_probs = model(**inputs, use_cache=False).logits[:, :-1].double().log_softmax(-1)
            tokens = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            found.append(tokens.where(labels >= 0, 0.0).sum(1).exp().cpu())
    return torch.cat(found)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout; the mode of training comes back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def rates(p: Tensor, rows: Sequence[Row], k: int) -> dict[str, dict[str, float]]:
    """For "all" and each length, exact `pass_at_1` and `pass_at_<k>` as means over the prompts."""
    lengths = torch.tensor([row["length"] for row in rows])
    members = {"all": lengths > 0} | {str(n): lengths == n for n in sorted(set(lengths.tolist()))}
    solved = {j: -torch.expm1(j * torch.log1p(-p)) for j in (1, k)}  # 1 - (1 - p)^j, for small p too
    return {name: {f"pass_at_{j}": float(solved[j][own].mean()) for j in (1, k)} for name, own in members.items()}
