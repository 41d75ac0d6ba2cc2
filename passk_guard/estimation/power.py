r"""How soon a conflict of a given size would be called on a probe of a given size, from the noise that was measured.

A look is one refresh. Its statistic $U_{k1} - \tau \sqrt{U_{11} U_{kk}}$ is taken to be normal around
$(c - \tau)|\nabla J_1||\nabla J_k|$ for a true cosine c and threshold $\tau$, with Hoeffding's variance at m prompts
(`noise`) and a variance estimate of as many degrees of freedom as the refreshes have shown. The noise at the
hypothetical c is assumed to be that at the present one. The rules themselves are those of the guard: `log_evidence`, or
the quantiles of each look, over simulated runs that are the same at every call. torch alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from passk_guard.estimation.evidence import log_evidence
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.estimation.noise import Noise
from passk_guard.estimation.verdict import DecisionRule

MOST_LOOKS = 200
"""Looks after which the search ends."""

MOST_PROMPTS = 1 << 16

_RUNS = 400
_DRAWS = 4000
_SEED = 0


@dataclass(frozen=True)
class Look:
    """One refresh, as its test sees it.

    Attributes:
        drift: mean of the statistic in its standard errors, positive where it speaks for a conflict.
        degrees: of freedom of the estimate of that standard error.
    """

    drift: float
    degrees: float


@dataclass(frozen=True)
class Signal:
    """|grad J_1||grad J_k|, which turns a cosine into an inner product.

    Attributes:
        size: the estimate; None where one of the norms is not established.
        most: what it is at most, at the confidence asked for.
        error: standard deviation of the logarithm of a drift made from it, the noise's own uncertainty included.
    """

    size: float | None
    most: float
    error: float


def signal_of(noise: Noise, confidence: float) -> Signal:
    """The signal, established where both squared norms are positive at this one-sided confidence."""
    quantile = student_t_quantile(confidence, noise.refreshes * noise.degrees)
    norms, errors = noise.value[1:].tolist(), [noise.error(1), noise.error(2)]
    most = math.sqrt(math.prod(max(0.0, norm + quantile * error) for norm, error in zip(norms, errors, strict=True)))
    if any(norm <= quantile * error for norm, error in zip(norms, errors, strict=True)):
        return Signal(None, most, math.inf)
    slope = torch.tensor([0.0, 1 / (2 * norms[0]), 1 / (2 * norms[1])], dtype=torch.float64)
    spread = noise.variance(slope, noise.prompts) / noise.refreshes
    return Signal(math.sqrt(norms[0] * norms[1]), most, math.sqrt(spread + 1 / (2 * noise.refreshes * noise.degrees)))


def look_of(noise: Noise, signal: float, cosine: float, prompts: float, threshold: float = 0.0) -> Look:
    """A refresh of this many prompts where the cosine is `cosine`.

    Args:
        signal: |grad J_1||grad J_k|, e.g. `Signal.size`.
        cosine: below `threshold` for a conflict.
    """
    slope = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    if threshold:
        slope[1:] = -threshold * signal / 2 / noise.value[1:].clamp(min=1e-300)
    error = math.sqrt(noise.variance(slope, prompts))
    drift = (threshold - cosine) * signal / error if error else math.copysign(math.inf, threshold - cosine)
    return Look(drift, noise.degrees_at(prompts))


def looks_until_called(
    look: Look, rule: DecisionRule, power: float, *, confidence: float = 0.95, pool: int = 3
) -> int | None:
    """Looks within which a run that is in conflict from its first look is called one with probability `power`.

    Args:
        look: every look of the run.
        rule: with `false_alarms`, by the evidence of the whole run; without, `patience` established looks in a row.
        power: in (0, 1).
        confidence, pool: of each look where there is no `false_alarms`, and refreshes pooled in it.

    Returns:
        None where `MOST_LOOKS` do not suffice.
    """
    generator = torch.Generator().manual_seed(_SEED)
    called = torch.zeros(_RUNS, dtype=torch.bool)
    refreshes: list[Tensor] = []
    streak = torch.zeros(_RUNS, dtype=torch.int64)
    checks = torch.empty(3, _RUNS, 0, dtype=torch.float64)
    for number in range(1, MOST_LOOKS + 1):
        refreshes = [*refreshes, _refresh(look, _RUNS, generator)][-pool:]
        if rule.false_alarms is None:
            established = _studentised(refreshes) < -student_t_quantile(confidence, len(refreshes) * look.degrees)
            streak = torch.where(established, streak + 1, 0)
            called |= streak >= rule.patience
        else:
            value, variance = refreshes[-1]
            newest = torch.stack([-value, variance, torch.full_like(value, look.degrees)])
            checks = torch.cat([checks, newest[..., None]], -1)
            going = ~called
            called[going] = log_evidence(*checks[:, going]) >= -math.log(rule.false_alarms)
        if float(called.double().mean()) >= power:
            return number
    return None


def power_of_one(look: Look, refreshes: int, confidence: float) -> float:
    """Chance that one estimate of so many pooled refreshes establishes the conflict, one-sided."""
    generator = torch.Generator().manual_seed(_SEED)
    t = _studentised([_refresh(look, _DRAWS, generator) for _ in range(refreshes)])
    return float((t < -student_t_quantile(confidence, refreshes * look.degrees)).double().mean())


def fewest_prompts(
    noise: Noise,
    signal: float,
    cosine: float,
    power: float,
    *,
    refreshes: int = 1,
    threshold: float = 0.0,
    confidence: float = 0.95,
) -> int | None:
    """The smallest m at which one estimate of `refreshes` pooled ones has this power; None above `MOST_PROMPTS`."""

    def enough(prompts: int) -> bool:
        look = look_of(noise, signal, cosine, prompts, threshold)
        return power_of_one(look, refreshes, confidence) >= power

    if not enough(MOST_PROMPTS):
        return None
    low, high = 3, MOST_PROMPTS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _refresh(look: Look, count: int, generator: torch.Generator) -> Tensor:
    """[2, count] statistic in standard errors; estimated over true variance, chi-squared (Wilson & Hilferty 1931)."""
    z = torch.randn(2, count, dtype=torch.float64, generator=generator)
    part = 2 / (9 * look.degrees)
    return torch.stack([z[0] - look.drift, (1 - part + math.sqrt(part) * z[1]).clamp(min=0.05) ** 3])


def _studentised(refreshes: list[Tensor]) -> Tensor:
    """[count] the average over refreshes, divided by its estimated standard error."""
    mean, variance = torch.stack(refreshes).mean(0)
    return mean * math.sqrt(len(refreshes)) / variance.sqrt()
