"""What each mitigation is predicted to do to this model's pass@k gradient, from the same Gram matrix.

The training gradient is assumed to be grad J_k, and the protected direction grad J_1, both as the probe estimates them.
A training batch adds noise. What is kept of the gain is cos(mitigated gradient, grad J_k): the share of
the first-order gain in J_k that a step of the same length has left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from passk_guard.analysis.estimates import angle, gradient_row, image, jackknife_error
from passk_guard.analysis.measure import cosine_of
from passk_guard.analysis.results import Number, Prediction
from passk_guard.analysis.settings import Settings
from passk_guard.estimation.records import ConflictEstimate, ProbeGram
from passk_guard.estimation.ustatistics import prompt_kernel
from passk_guard.mitigation.floor import solve_floor
from passk_guard.mitigation.projection import plan_projection
from passk_guard.passk.closed_forms import sample_coefficients


def predictions(probe: ProbeGram, estimates: Mapping[int, ConflictEstimate], settings: Settings) -> list[Prediction]:
    """One entry for each mitigation, at the largest k. The list is empty when only k = 1 was asked for.

    Args:
        probe: Gram matrix and counts.
        estimates: by k.
        settings: `gamma`, `floor_gamma` and `confidence`.
    """
    estimate = estimates.get(settings.k)
    if estimate is None:
        return []
    return [projected(estimate, settings.gamma), floored(probe, settings)]


def projected(estimate: ConflictEstimate, gamma: float) -> Prediction:
    """`project`: g_k <- g_k + c grad J_1 as in `mitigation.project`.

    With s = cos(g_k, grad J_1) < gamma: the cosine after is gamma / sqrt(1 + gamma^2 - s^2), and
    cos(g', g_k) = (1 + (gamma - s) s) / sqrt(1 + gamma^2 - s^2). Their intervals are what they reach on that of s.
    """
    cosine, setting = cosine_of(estimate), f"gamma = {gamma:g}"
    if cosine.value is None:
        return Prediction("project", setting, Number(), Number(), f"undetermined: {estimate.reason}")
    note = f"projects the gradient wherever its cosine is below {gamma:g}"
    if cosine.low is not None and cosine.low >= gamma:
        note = f"nothing to do: the whole interval of the cosine is above {gamma:g}"
    after = image(lambda s: _cosine_after(s, gamma), cosine)
    return Prediction("project", setting, after, image(lambda s: _kept(s, gamma), cosine), note)


def floored(probe: ProbeGram, settings: Settings) -> Prediction:
    """`reweight`: no prompt weighs less than the smallest floor at which the cosine reaches gamma.

    The cosine given is that of the floored gradient, measured on the samples that the floor was solved from.
    """
    k, gamma = settings.k, settings.floor_gamma
    solution = solve_floor([probe], k, gamma=gamma)
    if solution.floor is None:
        note = f"{solution.status.replace('_', ' ')}: {solution.reason}{_bound(probe)}"
        return Prediction("floor", f"for a cosine of {gamma:g}", Number(), Number(), note)
    floor = torch.cat(sample_coefficients(probe.num_samples, probe.num_correct, k, floor=solution.floor))
    cosine = angle(probe, floor, gradient_row(probe, 1), settings.confidence)
    kept = angle(probe, floor, gradient_row(probe, k), settings.confidence)
    error = "" if solution.standard_error is None else f" ± {solution.standard_error:.2f}"
    solved = f"the smallest floor for a cosine of {gamma:g}"
    note = "no floor is needed" if solution.status == "not_needed" else solved
    if cosine.value is None:
        note += ", but the floored gradient is too small against its noise for an interval"
    return Prediction("floor", f"floor = {solution.floor:.2f}{error}", cosine, kept, f"{note}{_bound(probe)}")


def harmless_ratio(probe: ProbeGram) -> Number:
    """A+ / A- with its jackknife error: weights of which none is more than this many times another cannot conflict.

    A+ = E[max(a, 0)] and A- = E[max(-a, 0)] (arXiv 2602.21189, Sec. 4). Noise in the agreement scores pulls it towards
    1, to the safe side. Nothing where no prompt disagrees, or none of the rest once one is left out.
    """
    one = gradient_row(probe, 1)
    kernel = prompt_kernel(probe, one, one)
    kernel = kernel - torch.diag(kernel.diagonal())
    rows = kernel.sum(1)
    without = (rows[None, :] - kernel).fill_diagonal_(0.0)  # row j: the agreements when prompt j is left out
    up, down = without.clamp(min=0).sum(1), -without.clamp(max=0).sum(1)
    if not bool((down > 0).all()) or not bool((rows < 0).any()):
        return Number()
    return Number(float(rows.clamp(min=0).sum() / -rows.clamp(max=0).sum()), jackknife_error(up / down))


def _bound(probe: ProbeGram) -> str:
    ratio = harmless_ratio(probe)
    if ratio.value is None or ratio.value <= 1:
        return ""
    return f"; theory: weights within A+/A- = {ratio.value:.2g} ± {ratio.standard_error:.1g} cannot conflict"


def _cosine_after(cosine: float, gamma: float) -> float:
    after = plan_projection(cosine, 1.0, 1.0, gamma).cosine_after
    return 0.0 if after is None else after  # gamma = 0 and opposite vectors: the limit from either side


def _kept(cosine: float, gamma: float) -> float:
    if cosine >= gamma:
        return 1.0
    left = 1 + gamma * gamma - cosine * cosine
    return (1 + (gamma - cosine) * cosine) / math.sqrt(left) if left > 0 else 0.0
