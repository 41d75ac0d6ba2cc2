"""What the angle and the realised change get wrong where a sampler's policy is not quite the model's.

    python -m benchmarks.sampler_mismatch --stand-in [--draws 300]
    make venv-vllm && OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
        .venv-vllm/bin/python -m benchmarks.sampler_mismatch [--draws 300]

A float32 model answers 256 prompts with one token. The sampler's probabilities of all tokens are read off, so that the
two policies are known exactly. Each draw takes 64 of the prompts and 16 samples of each by the sampler's probabilities,
and is estimated with and without the ratios of model and sampler, as the guard does.

Without --stand-in the model is random, even tokens are right, and vLLM samples it in bfloat16, its default on a CPU.
Log ratios are multiplied by 1 and by 4, for a mismatch as large as longer completions have.

With --stand-in the model is trained on pass@1 first, for every eighth token to be right, until its gradients stand out
from their noise. Its stand-ins for a sampler are the same weights in bfloat16, and the same logits at temperature 1.05
and 1.2. vLLM is not needed. A line has

    mismatch, share   root mean square log ratio in nats, and the share that samples are worth to the model
    mean_score        length of the mean score under the sampler, 0 under the model, over that of grad J_1
    U_k1, U_11, U_kk  mean estimates of <grad J_8, grad J_1>, |grad J_1|^2 and |grad J_8|^2 over the exact values, which
                      are means over pairs of different prompts, each with the standard error of the mean over draws
    expected          the exact expectation of the same three without the ratios, over the exact values: a sum over the
                      numbers of right samples, no draw. With the ratios it is 1
    held              how often 95% intervals of <grad J_8, grad J_1> hold it
    changes_held      the same of the change of pass@1 and of pass@8 after an update, and
    change_bias       the mean error of these changes in standard errors of one draw
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passk_guard.change import estimate_change
from passk_guard.estimation.estimate import estimate_pooled
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.estimation.records import ProbeGram
from passk_guard.passk.closed_forms import passk_weight, sample_coefficients
from passk_guard.passk.importance import effective_share, miss_estimates

POOL, PROMPTS, SAMPLES, K, DIM, RATE, STEPS = 256, 64, 16, 8, 1024, 0.5, 5


def main() -> None:
    """Print one JSON line for each sampler, with and without the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--stand-in", action="store_true", help="a trained model, and no vLLM")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    pi, samplers, right, scores, updated = stand_in() if given.stand_in else with_vllm()
    for name, sampler in samplers.items():
        for ratios in (False, True):
            row = {"sampler": name, **_row(pi, sampler, updated, scores, right, given.draws, ratios)}
            print(json.dumps(row), flush=True)


Policies = tuple[Tensor, dict[str, Tensor], Tensor, Tensor, Tensor]
"""[m, V] log pi, [m, V] log mu by name, [V] which tokens are right, scores and updated log pi as `_scores` has them."""


def with_vllm() -> Policies:
    """A random model, sampled by vLLM."""
    with tempfile.TemporaryDirectory() as folder:
        model, prompts = _model(Path(folder))
        pi = _log_probs(model, prompts)
        mu = _of_vllm(folder, prompts, pi.shape[1])
    samplers = {f"vLLM, log ratios x {x}": (pi + x * (mu - pi)).log_softmax(1) for x in (1, 4)}
    right = torch.arange(pi.shape[1]) % 2 == 0
    return pi, samplers, right, *_scores(model, prompts, pi, right)


def stand_in(steps: int = STEPS) -> Policies:
    """A model trained on pass@1 for so many steps, and what stands in for another engine's policy."""
    model, prompts = _model()
    right = torch.arange(model.config.vocab_size) % 8 == 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (-_rate(model, prompts, right).mean()).backward()
        optimizer.step()
    pi = _log_probs(model, prompts)
    samplers = {
        "bfloat16": _log_probs(copy.deepcopy(model).bfloat16(), prompts),
        "temperature 1.05": (pi / 1.05).log_softmax(1),
        "temperature 1.2": (pi / 1.2).log_softmax(1),
    }
    return pi, samplers, right, *_scores(model, prompts, pi, right)


def _model(folder: Path | None = None) -> tuple[Any, list[list[int]]]:
    """A random model, also written into `folder`, and prompts."""
    from tests.helpers.tiny import tiny_model, tiny_tokenizer
    from tests.vllm.runs import SHAPE

    model = tiny_model("llama", **SHAPE).eval()
    if folder is not None:
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(6, len(tiny_tokenizer()), (POOL, 6), generator=generator).tolist()


def _rate(model: Any, prompts: list[list[int]], right: Tensor) -> Tensor:
    return model(torch.tensor(prompts)).logits[:, -1].softmax(-1)[:, right].sum(1)


def _log_probs(model: Any, prompts: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor(prompts)).logits[:, -1].double().log_softmax(-1)


def _of_vllm(folder: str, prompts: list[list[int]], vocabulary: int) -> Tensor:
    """[m, V] log mu of the next token, as vLLM computes them for sampling."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(folder, max_model_len=64, enforce_eager=True, max_logprobs=vocabulary)
    wanted = SamplingParams(max_tokens=1, logprobs=vocabulary)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], wanted, use_tqdm=False)
    found = torch.zeros(len(prompts), vocabulary, dtype=torch.float64)
    for row, output in zip(found, outputs, strict=True):
        for token, value in output.outputs[0].logprobs[0].items():
            row[token] = value.logprob
    assert torch.allclose(found.exp().sum(1), torch.ones(len(prompts), dtype=torch.float64), atol=1e-4)
    return found


def _scores(model: Any, prompts: list[list[int]], pi: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """[m, V, DIM] projected score vectors of every token, and [m, V] log probabilities after a step up J_1."""
    from passk_guard.sketch import ScoreSketcher, token_batches

    m, v = pi.shape
    sketcher = ScoreSketcher(model, DIM)
    found = torch.zeros(m * v, sketcher.dim)
    flat = [prompt for prompt in prompts for _ in range(v)]
    answers = [[y] for _ in range(m) for y in range(v)]
    for batch in token_batches(flat, answers, range(m * v), max_tokens=1 << 12, pad_token_id=0, device="cpu"):
        slots = torch.arange(len(batch.slots))
        rows = sketcher.sketch(batch.input_ids, batch.attention_mask, batch.completion_mask, slots, len(slots))
        found[batch.slots] = rows.float()
    model.zero_grad()
    _rate(model, prompts, right).mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.add_(RATE * p.grad)
    return found.view(m, v, -1), _log_probs(model, prompts)


def _row(
    pi: Tensor, mu: Tensor, updated: Tensor, scores: Tensor, right: Tensor, draws: int, ratios: bool
) -> dict[str, Any]:
    """Exact values, and how often the intervals of so many draws hold them."""
    rates, after = ((x.exp() * right).sum(1) for x in (pi, updated))
    slopes = torch.einsum("xv,xvd->xd", (pi.exp() * right).float(), scores).double()
    each = torch.stack([passk_weight(rates, k)[:, None] * slopes for k in (1, K)])  # [2, x, d]
    one = each[0].mean(0)
    exact, expected = _pairs(each), _pairs(_expected_gradients(mu, scores, right))
    changes = torch.stack([((1 - rates) ** k - (1 - after) ** k).mean() for k in (1, K)])
    mean_score = torch.einsum("xv,xvd->xd", mu.exp().float(), scores).mean(0)
    values, errors, held, share = torch.zeros(draws, 3), torch.zeros(draws, 2), torch.zeros(3), 0.0
    generator = torch.Generator().manual_seed(1)
    for draw in range(draws):
        chosen = torch.randperm(POOL, generator=generator)[:PROMPTS]
        tokens = torch.multinomial(mu[chosen].exp(), SAMPLES, True, generator=generator)
        logs = (pi - mu)[chosen].gather(1, tokens)
        share += float(effective_share(logs, torch.ones_like(logs, dtype=torch.bool)).mean()) / draws
        angle = estimate_pooled([_gram(tokens, logs, scores[chosen], right, ratios)], K, curve=False)
        assert angle.inner_product is not None
        assert angle.inner_product_se is not None
        values[draw] = torch.tensor([angle.inner_product, angle.norm1_sq, angle.normk_sq])
        reach = student_t_quantile(0.975, angle.degrees or 1.0) * angle.inner_product_se
        held[0] += abs(angle.inner_product - float(exact[0])) <= reach
        moved = (updated - pi)[chosen].gather(1, tokens)
        found = estimate_change(moved, right[tokens].long(), K, sampler=logs if ratios else None)
        sides = (
            (found.pass_at_1, found.pass_at_1_se, found.degrees),
            (found.pass_at_k, found.pass_at_k_se, found.degrees_k),
        )
        for i, (value, error, degrees) in enumerate(sides):
            off = value - float(changes[i])
            held[1 + i] += abs(off) <= student_t_quantile(0.975, degrees) * error
            errors[draw, i] = off / error
    relative, spread = values.mean(0) / exact, values.std(0) / exact.abs() / draws**0.5
    return {
        "ratios": ratios,
        "mismatch": round(float(((mu.exp() * (pi - mu).square()).sum(1).mean()).sqrt()), 4),
        "share": round(share, 3),
        "mean_score": round(float(mean_score.norm() / one.norm()), 3),
        **{
            name: [round(float(x), 3), round(float(e), 3)]
            for name, x, e in zip(("U_k1", "U_11", "U_kk"), relative, spread, strict=True)
        },
        "expected": [round(float(x), 3) for x in expected / exact],
        "pass_at_1": round(float(rates.mean()), 3),
        "changes": [round(float(x), 4) for x in changes],
        "cosine": round(float(exact[0] / (exact[1] * exact[2]).sqrt()), 3),
        "held": round(float(held[0]) / draws, 3),
        "changes_held": [round(float(x) / draws, 3) for x in held[1:]],
        "change_bias": [round(float(x), 2) for x in errors.mean(0)],
    }


def _pairs(each: Tensor) -> Tensor:
    """[3]: U_k1, U_11 and U_kk of gradients [2, x, d], over pairs of different prompts, as a draw takes each once."""
    total = torch.einsum("kd,ld->kl", each.sum(1), each.sum(1)) - torch.einsum("kxd,lxd->kl", each, each)
    pairs = total / (each.shape[1] * (each.shape[1] - 1))
    return torch.stack([pairs[1, 0], pairs[0, 0], pairs[1, 1]])


def _expected_gradients(mu: Tensor, scores: Tensor, right: Tensor) -> Tensor:
    """[2, x, d]: what each prompt's estimates of grad J_1 and grad J_K are on average over samples of mu, unweighed.

    E[alpha+(c) S+ + alpha-(c) S-] over c ~ Binomial(n, p). Given c, E[S+] = c E[s | right], E[S-] = (n-c) E[s | wrong].
    """
    p = (mu.exp() * right).sum(1)
    of_right = torch.einsum("xv,xvd->xd", mu.exp() * right, scores.double()) / p[:, None]
    of_wrong = torch.einsum("xv,xvd->xd", mu.exp() * ~right, scores.double()) / (1 - p)[:, None]
    c = torch.arange(SAMPLES + 1, dtype=torch.float64)
    chance = torch.distributions.Binomial(SAMPLES, p[:, None]).log_prob(c).exp()  # [x, n + 1]
    found = []
    for k in (1, K):
        plus, minus = sample_coefficients(torch.full_like(c, SAMPLES), c, k)
        found.append((chance @ (plus * c))[:, None] * of_right + (chance @ (minus * (SAMPLES - c)))[:, None] * of_wrong)
    return torch.stack(found)


def _gram(tokens: Tensor, logs: Tensor, scores: Tensor, right: Tensor, ratios: bool) -> ProbeGram:
    correct = right[tokens]
    taken = scores.gather(1, tokens[..., None].expand(-1, -1, scores.shape[-1]))
    if ratios:
        taken = taken * logs.exp()[..., None]
    sums = torch.cat([(taken * correct[..., None]).sum(1), (taken * ~correct[..., None]).sum(1)])
    n, c = torch.full((len(tokens),), SAMPLES), correct.sum(1)
    misses = miss_estimates(logs, ~correct, n) if ratios else None
    return ProbeGram(sums @ sums.T, n, c, misses=misses, corrected=ratios)


if __name__ == "__main__":
    main()
