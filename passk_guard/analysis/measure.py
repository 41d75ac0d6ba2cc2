"""From the Gram matrix to what is said of the whole probe: rates, cosines, k*, the kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from passk_guard.analysis.estimates import at_k, jackknife_error, kernel_of, mean, mixed, with_error
from passk_guard.analysis.results import AtK, Curve, Kernel, Number
from passk_guard.analysis.settings import Settings
from passk_guard.estimation.estimate import estimate_pooled
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.estimation.records import ConflictEstimate, ProbeGram
from passk_guard.passk.closed_forms import pass_at_k, unbiased_passk_weight


def estimate_each(probe: ProbeGram, settings: Settings) -> dict[int, ConflictEstimate]:
    """The estimate at every k above 1."""
    threshold, confidence = settings.threshold, settings.confidence
    return {k: estimate_pooled([probe], k, threshold=threshold, confidence=confidence) for k in settings.ks if k > 1}


def measure_at(probe: ProbeGram, k: int, estimate: ConflictEstimate | None, confidence: float) -> AtK:
    """Pass rate, mean weight and conflict at one k; `estimate` is None at k = 1."""
    n, c = probe.num_samples, probe.num_correct
    rate = mean(pass_at_k(n, c, k), confidence, low=0.0, high=1.0)
    if estimate is None:
        return AtK(k, rate, Number(1.0), Number(), Number(), None, "grad J_1 against itself")
    return AtK(
        k=k,
        pass_rate=rate,
        mean_weight=mean(unbiased_passk_weight(n, c, k), confidence, low=0.0),
        cosine=cosine_of(estimate),
        inner_product=inner_product_of(estimate),
        status=estimate.status,
        reason=estimate.reason,
    )


def cosine_of(estimate: ConflictEstimate) -> Number:
    """cos(grad J_k, grad J_1) with its interval; nothing where the probe does not determine it."""
    return Number(estimate.cosine, estimate.standard_error, estimate.ci_low, estimate.ci_high)


def inner_product_of(estimate: ConflictEstimate) -> Number:
    """<grad J_k, grad J_1> with its interval."""
    if estimate.inner_product is None or estimate.inner_product_se is None:
        return Number()
    quantile = student_t_quantile(
        (1 + estimate.confidence) / 2, estimate.degrees or max(1, estimate.num_informative - 1)
    )
    return with_error(estimate.inner_product, estimate.inner_product_se, quantile)


def curve_of(estimates: dict[int, ConflictEstimate]) -> Curve | None:
    """The curve over k, which every determined estimate holds; None where none is."""
    held = [(e.curve, e.k_star) for e in estimates.values() if e.curve is not None and e.k_star is not None]
    if not held:
        return None
    curve, k_star = held[-1]
    return Curve(
        k=curve.k.tolist(),
        cosine=_numbers(curve.cosine),
        low=_numbers(curve.ci_low),
        high=_numbers(curve.ci_high),
        established=curve.established.tolist(),
        k_star=k_star,
    )


def kernel_from(probe: ProbeGram, names: list[int]) -> Kernel:
    """The kernel of the prompts with a gradient, from easy to hard.

    Args:
        probe: m prompts.
        names: [m] their places.
    """
    rate = probe.num_correct.double() / probe.num_samples
    rows = mixed(probe).nonzero().flatten()
    rows = rows[rate[rows].argsort(descending=True, stable=True)]
    kernel = kernel_of(probe, at_k(probe, 1), at_k(probe, 1))[rows][:, rows]
    below = [[_short(v) for v in row[:i]] for i, row in enumerate(kernel.tolist())]
    return Kernel([names[i] for i in rows.tolist()], below, _negative_pairs(kernel))


def _negative_pairs(kernel: Tensor) -> Number:
    """Share of negative entries off the diagonal, with the jackknife over prompts; none below three prompts."""
    m = kernel.shape[0]
    if m < 3:
        return Number()
    negative = (kernel < 0).double() - torch.diag((kernel.diagonal() < 0).double())
    without = (negative.sum() - 2 * negative.sum(1)) / ((m - 1) * (m - 2))
    return Number(float(negative.sum()) / (m * (m - 1)), jackknife_error(without))


def _numbers(values: Tensor) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
