"""Which prompts pull against the rest: kernel, agreement scores, and how the weights fall on them. torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.ustatistics import Rows, coefficients, other_prompt_sums, passk_rows, prompt_kernel
from passk_guard.passk.closed_forms import unbiased_passk_weight

_PASS_AT_1 = passk_rows(torch.tensor([1]))


def informative(probe: ProbeGram) -> Tensor:
    """[m] bool: prompts with both right and wrong samples; the others have no gradient estimate but zero."""
    return (probe.num_correct > 0) & (probe.num_correct < probe.num_samples)


def prompt_view(probe: ProbeGram, rows: Rows) -> dict[str, Any]:
    r"""One refresh, prompt by prompt: the per-prompt fields of `ConflictEstimate`.

    $a(x) = \frac{1}{m-1} \sum_{x' \ne x} \langle g_1(x), g_1(x') \rangle$ estimates the agreement score of
    arXiv 2602.21189, Sec. 4, and the same sum with g_k(x) on the left is prompt x's share of the conflict: its mean
    over prompts is the inner product; `rows` gives the coefficients of that g. Pairs are counted as negative among
    prompts with a gradient only.
    """
    m = probe.num_samples.numel()
    one = coefficients(probe, torch.tensor([1]))[0]
    kernel = prompt_kernel(probe, one, one)
    mixed = informative(probe)
    pairs = mixed[:, None] & mixed[None, :] & ~torch.eye(m, dtype=torch.bool)
    return {
        "kernel": kernel,
        "agreement": off_diagonal_sums(probe, _PASS_AT_1) / (m - 1),
        "weighted_agreement": off_diagonal_sums(probe, rows) / (m - 1),
        "frac_negative_pairs": int(((kernel < 0) & pairs).sum()) / int(pairs.sum()) if bool(pairs.any()) else None,
    }


def weight_and_agreement(probes: Sequence[ProbeGram], k: int) -> dict[str, Any]:
    """E[w_k] and cov(w_k, a), pooled over the refreshes with fresh samples; nothing where the newest has none.

    Of samples of an earlier policy, the ratios are known where there is a gradient, and E[w_k] is over all prompts.
    cov = E[w a] - E[w] E[a]; the product is averaged over triples of different prompts, so it is unbiased too.
    """
    if probes[-1].reused:
        return {}
    probes = [p for p in probes if not p.reused]
    total = sum(p.num_samples.numel() for p in probes)
    mean_weight = covariance = 0.0
    for probe in probes:
        m = probe.num_samples.numel()
        weight = unbiased_passk_weight(probe.num_samples, probe.num_correct, k)
        agreement = off_diagonal_sums(probe, _PASS_AT_1)
        triples = float(weight.sum() * agreement.sum() - 2 * weight @ agreement) / (m * (m - 1) * (m - 2))
        inner = float(off_diagonal_sums(probe, passk_rows(torch.tensor([k]))).sum()) / (m * (m - 1))
        mean_weight += m / total * float(weight.mean())
        covariance += m / total * (inner - triples)
    return {"mean_weight": mean_weight, "weight_agreement_cov": covariance}


def off_diagonal_sums(probe: ProbeGram, rows: Rows) -> Tensor:
    """[m] sum over x' != x of <g(x), g_1(x')>, with the g of the one row."""
    return other_prompt_sums(probe, rows(probe)[0], _PASS_AT_1(probe)[0])


def mean_positive_and_negative(probe: ProbeGram) -> tuple[float, float]:
    """A+ = E[max(a, 0)] and A- = E[max(-a, 0)] of the agreement scores; noise in the scores raises both alike."""
    agreement = off_diagonal_sums(probe, _PASS_AT_1) / (probe.num_samples.numel() - 1)
    return float(agreement.clamp(min=0).mean()), float((-agreement).clamp(min=0).mean())
