"""The angle between two weightings of the same prompts' gradients, as the estimator has it for J_k and J_1."""

from __future__ import annotations

import torch
from torch import Tensor

from passk_guard.analysis.kernels import Coefficients, kernel_of, mixed
from passk_guard.analysis.record import Number
from passk_guard.estimation.intervals import corrected_cosine, cosine_bounds, student_t_quantile
from passk_guard.estimation.jackknife import jackknife_overshoot
from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.ustatistics import Moments


def angle(probe: ProbeGram, left: Coefficients, right: Coefficients, confidence: float) -> Number:
    r"""cos(E[g], E[h]) from U-statistics over pairs of different prompts, with its interval.

    $U_{gh} / \sqrt{U_{gg} U_{hh}}$; bounds by `intervals.cosine_bounds` from the jackknife over prompts.

    Args:
        probe: m prompts.
        left, right: coefficients of S+ and S- that give g(x) and h(x).
        confidence: of the two-sided interval.

    Returns:
        Nothing where a squared norm is not positive, where no cosine can be ruled out, or below three prompts with a
        gradient.
    """
    if int(mixed(probe).sum()) < 3:
        return Number()
    pairs = [(left, right), (right, right), (left, left)]
    kernels = [kernel_of(probe, *pair) for pair in pairs]
    values, changes = zip(*(_statistic(kernel) for kernel in kernels), strict=True)
    value, influence = torch.stack(values), torch.stack(changes)
    if not bool((value[1:] > 0).all()):
        return Number()
    symmetric = torch.stack([(kernel + kernel.T) / 2 for kernel in kernels])
    moments = Moments(value[None], influence.T[:, None], value[None], lambda: jackknife_overshoot(symmetric)[:, None])
    covariance = moments.covariance[0]
    cosine, error = corrected_cosine(value, covariance)
    degrees = float(moments.degrees_at(torch.tensor([cosine], dtype=torch.float64))[0])
    low, high = cosine_bounds(value, covariance, student_t_quantile((1 + confidence) / 2, degrees))
    if (low, high) == (-1.0, 1.0):
        return Number()
    return Number(cosine, error, low, high)


def _statistic(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Mean off the diagonal, and [m] what it is with each prompt left out."""
    m = kernel.shape[0]
    others = kernel - torch.diag(kernel.diagonal())
    total = others.sum()
    return total / (m * (m - 1)), (total - others.sum(0) - others.sum(1)) / ((m - 1) * (m - 2))
