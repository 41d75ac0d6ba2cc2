"""Confidence bounds for a cosine whose norms are noisy too. Needs torch alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def student_t_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t by Cornish-Fisher expansion to third order (Abramowitz & Stegun 26.7.5).

    Args:
        probability: in (0, 1).
        degrees: degrees of freedom, > 0. Within 0.3% of the exact value from 3 degrees on, at 0.9 to 0.975.
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


def cosine_bounds(moments: Tensor, covariance: Tensor, quantile: float) -> tuple[float, float]:
    r"""Bounds on cos = a / b, with $a = U_{k1}$ and $b = \sqrt{U_{11} U_{kk}}$, by inverting a test.

    A value c is rejected when $|a - c b|$ exceeds `quantile` standard errors of $a - c b$ (Fieller 1954, with the
    delta method for b). At c = 0 this is the test of the inner product alone, so that a noisy norm neither hides nor
    creates a conflict. Where the norms are not established the bounds widen to -1 and 1. The upper bound is the
    smallest value rejected from below: rejecting c rejects every larger cosine too.

    Args:
        moments: [3] U_k1, U_11, U_kk, the last two positive.
        covariance: [3, 3] of those estimates.
        quantile: of the reference distribution, > 0, e.g. 1.645 for a one-sided 95% bound.

    Returns:
        (lower, upper), each in [-1, 1].
    """
    a, norm1_sq, normk_sq = (float(x) for x in moments)
    b = math.sqrt(norm1_sq * normk_sq)
    slope_b = torch.tensor([0.0, b / (2 * norm1_sq), b / (2 * normk_sq)], dtype=torch.float64)
    cov_ab = covariance.double().cpu() @ slope_b
    var_a, cov, var_b = float(covariance[0, 0]), float(cov_ab[0]), float(slope_b @ cov_ab)
    # c is rejected where the parabola A c^2 + B c + C is positive. In units of b, so that tiny gradients survive.
    z_sq = quantile**2
    quad = 1 - z_sq * var_b / b**2
    lin = -2 * (a / b - z_sq * cov / b**2)
    const = (a / b) ** 2 - z_sq * var_a / b**2
    if abs(quad) < 1e-12:
        quad = math.copysign(1e-12, quad)
    root = lin**2 - 4 * quad * const
    if root <= 0 and quad < 0:
        return -1.0, 1.0
    spread = math.sqrt(max(root, 0.0)) / (2 * abs(quad))
    centre = -lin / (2 * quad)
    low, high = centre - spread, centre + spread
    if quad < 0:
        # The norms are not established: only what lies between the roots is rejected, all of it on one side.
        rejected_from_below = a / b < centre
        low, high = (-1.0, low) if rejected_from_below else (high, 1.0)
    return max(-1.0, min(1.0, low)), max(-1.0, min(1.0, high))
