"""Confidence bounds for a cosine whose norms are noisy too. Needs torch alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)

_GRID = 129
_FINER = 3  # times that the grid is made 128 times as fine, around a bound


def student_t_quantile(probability: float, degrees: Number) -> Number:
    """Quantile of Student's t by Cornish-Fisher expansion to third order (Abramowitz & Stegun 26.7.5).

    Args:
        probability: in (0, 1).
        degrees: degrees of freedom, > 0, one number or a tensor. Within 0.3% of the exact value from 3 degrees on, at
            0.9 to 0.975.
    """
    z = float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def corrected_cosine(moments: Tensor, covariance: Tensor) -> tuple[float, float]:
    """The cosine U_k1 / sqrt(U_11 U_kk) less its bias, clipped to [-1, 1], and its delta-method standard error.

    Noisy squared norms in the denominator make the ratio too large. Its bias to second order in their errors is
    subtracted, damped where those errors are not small against the norms.

    Args:
        moments: [3] U_k1, U_11, U_kk, the last two positive.
        covariance: [3, 3] of those estimates.
    """
    inner, norm1_sq, normk_sq = (float(x) for x in moments)
    scale = math.sqrt(norm1_sq * normk_sq)
    cosine = inner / scale
    slope = torch.tensor([1 / scale, -cosine / (2 * norm1_sq), -cosine / (2 * normk_sq)], dtype=torch.float64)
    unit = torch.tensor([scale, norm1_sq, normk_sq], dtype=torch.float64)
    relative = covariance.double() / unit[:, None] / unit[None, :]
    noise1, noisek = float(relative[1, 1]), float(relative[2, 2])
    bias = cosine * (3 * (noise1 + noisek) / 8 + float(relative[1, 2]) / 4)
    bias -= float(relative[0, 1] + relative[0, 2]) / 2
    corrected = cosine - bias / (1 + 2 * max(noise1, noisek))
    return max(-1.0, min(1.0, corrected)), max(0.0, float(slope @ covariance @ slope)) ** 0.5


def cosine_bounds(moments: Tensor, covariance: Tensor, quantile: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    r"""Bounds on cos = a / b, with $a = U_{k1}$ and $b = \sqrt{U_{11} U_{kk}}$, by inverting a test.

    A value c is rejected when $|a - c b|$ exceeds `quantile(c)` standard errors of $a - c b$ (Fieller 1954, with the
    delta method for b): every c by the degrees of freedom of its own contrast. At c = 0 this is the test of the inner
    product alone. Where the norms are not established the bounds widen to -1 and 1. The upper bound is the smallest
    value rejected from below: rejecting c rejects every larger cosine too. So c is outside the bounds if, and but for
    that only if, its own test rejects it: one rule for the interval and for a verdict at a threshold.

    Args:
        moments: [3] U_k1, U_11, U_kk, the last two positive.
        covariance: [3, 3] of those estimates.
        quantile: of the reference distribution at each c of a tensor, > 0, e.g. 1.96 for 95% bounds.

    Returns:
        (lower, upper), each in [-1, 1], to 1e-8.
    """
    inner, norm1_sq, normk_sq = (float(x) for x in moments)
    length = math.sqrt(norm1_sq * normk_sq)
    unit = torch.tensor([1 / length, -1 / (2 * norm1_sq), -1 / (2 * normk_sq)], dtype=torch.float64)
    left, right = (unit * torch.tensor(x, dtype=torch.float64) for x in ([1.0, 0, 0], [0, 1.0, 1.0]))
    covariance, ratio = covariance.double().cpu(), inner / length
    var_a, cov, var_b = (float(x @ covariance @ y) for x, y in ((left, left), (left, right), (right, right)))

    def outermost(sign: int) -> float:
        """The bound on the side of `sign`, in units in which it is the upper one."""
        low, high = -1.0, 1.0
        for _ in range(1 + _FINER):
            c = torch.linspace(low, high, _GRID, dtype=torch.float64)
            variance = (var_a + 2 * sign * c * cov + c.square() * var_b).clamp(min=0)
            rejected = c - sign * ratio > quantile(sign * c) * variance.sqrt()
            if not bool(rejected.any()):
                return 1.0
            first = int(rejected.int().argmax())
            if first == 0:
                return low
            low, high = float(c[first - 1]), float(c[first])
        return high

    return -outermost(-1), outermost(1)
