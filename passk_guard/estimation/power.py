r"""The noise of a refresh's own statistic, and how soon a conflict would be called at it on a probe of another size.

By Hoeffding (1948) a U-statistic of m prompts with kernel $\theta + h_1(x) + h_1(y) + h_2(x, y)$ has the variance
$4 \zeta_1/m + 2 \zeta_2/(m(m-1))$, $\zeta_i = Var(h_i)$. Both are known without bias from what the estimate computes
anyway: the jackknife expects $4 \zeta_1/m + 4 \zeta_2/(m(m-2))$ and its overshoot is a known multiple of $\zeta_2$.

A look is one refresh. Its statistic $U_{k1} - \tau \sqrt{U_{11} U_{kk}}$ is taken to be normal around
$(c - \tau)|\nabla J_1||\nabla J_k|$ for a true cosine c and threshold $\tau$, with that variance at m prompts and a
variance estimate of as many degrees of freedom as the refreshes have shown. The noise at the hypothetical c is assumed
to be that at the present one. The rules themselves are those of the guard: `log_evidence`, or the quantiles of each
look, over simulated runs that are the same at every call. torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from passk_guard.estimation.evidence import log_evidence
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.ustatistics import cluster_sizes, passk_rows, refresh_moments
from passk_guard.estimation.verdict import DecisionRule
from passk_guard.utils.errors import GuardError

MOST_LOOKS = 200
"""Looks after which the search ends."""

MOST_PROMPTS = 1 << 16

_RUNS = 400
_FINE = 16  # checks up to twice this number are all looked at, later ones about 16 times per doubling
_DRAWS = 4000
_SEED = 0
_FEWEST_PROMPTS = 4  # below, nothing is left to tell the two parts apart


@dataclass(frozen=True)
class Noise:
    """Signal and noise of U_k1, U_11, U_kk, in that order, on average over refreshes with prompts of their own.

    Attributes:
        prompts: m of a refresh. refreshes: how many are averaged.
        value: [3] float64, estimates of <grad J_k, grad J_1>, |grad J_1|^2, |grad J_k|^2.
        linear, degenerate: [3, 3] float64, unbiased estimates of zeta_1 and zeta_2; `linear` may be indefinite.
        degrees: of freedom of the variance of U_k1 in one refresh, see `Moments.degrees`.
        solved, failed: share of prompts whose samples are all right, or all wrong: they have no gradient.
    """

    prompts: float
    refreshes: int
    value: Tensor
    linear: Tensor
    degenerate: Tensor
    degrees: float
    solved: float
    failed: float

    def variance(self, slope: Tensor, prompts: float) -> float:
        """Of slope . U in one refresh of this many prompts; neither part of it is taken to be negative."""
        linear, degenerate = (max(0.0, float(slope @ part @ slope)) for part in (self.linear, self.degenerate))
        return 4 * linear / prompts + 2 * degenerate / (prompts * (prompts - 1))

    def error(self, which: int) -> float:
        """Standard error of `value[which]`, all refreshes together."""
        slope = torch.zeros(3, dtype=torch.float64)
        slope[which] = 1
        return math.sqrt(self.variance(slope, self.prompts) / self.refreshes)

    def degrees_at(self, prompts: float) -> float:
        """Degrees of freedom in a refresh of this many prompts: in proportion, in [3, prompts - 1]."""
        return max(3.0, min(self.degrees * prompts / self.prompts, prompts - 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON; `planning.inputs.read_noise` is the inverse."""
        values = {name: value for name, value in vars(self).items() if name != "refreshes"}
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}


def measure_noise(probe: ProbeGram, k: int) -> Noise | None:
    """The noise of one refresh; None below 4 clusters of prompts, where no prompt has a gradient, or for kept samples.

    Args:
        probe: one refresh, checked, with at least k samples of each prompt. Samples of an earlier refresh add no
            evidence, and would count their draw twice.
    """
    m = len(cluster_sizes(probe))
    known = m >= _FEWEST_PROMPTS and not probe.reused
    moments = refresh_moments(probe, passk_rows(torch.tensor([k]))) if known else None
    if moments is None or not bool(moments.jackknife[0].any()):
        return None
    degenerate = moments.overshoots.sum(0)[0] / (4 / (m * (m - 2)) - 2 / (m * (m - 1)))
    size = probe.num_samples.numel() / m  # as many prompts to a cluster in a probe of another size
    return Noise(
        prompts=probe.num_samples.numel(),
        refreshes=1,
        value=moments.value[0],
        linear=size * m / 4 * (moments.jackknife[0] - 4 / (m * (m - 2)) * degenerate),
        degenerate=size**2 * degenerate,
        degrees=float(moments.degrees[0]),
        solved=float((probe.num_correct == probe.num_samples).double().mean()),
        failed=float((probe.num_correct == 0).double().mean()),
    )


def average_noise(parts: Sequence[Noise]) -> Noise:
    """The mean of several, each with the weight of its prompts.

    Every part stays unbiased; where gradients grow along a run, the refreshes in which they are large count most.

    Raises:
        GuardError: of none.
    """
    if not parts:
        raise GuardError("Expected the noise of at least one refresh; found none.")
    weights = torch.tensor([part.prompts * part.refreshes for part in parts], dtype=torch.float64)
    weights = weights / weights.sum()

    def mean(name: str) -> Any:
        values = torch.stack([torch.as_tensor(getattr(part, name), dtype=torch.float64) for part in parts])
        found = torch.tensordot(weights, values, dims=1)
        return found if found.ndim else float(found)

    return Noise(
        refreshes=sum(part.refreshes for part in parts),
        **{field.name: mean(field.name) for field in fields(Noise) if field.name != "refreshes"},
    )


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
            quantile = student_t_quantile((1 + confidence) / 2, len(refreshes) * look.degrees)
            established = _studentised(refreshes) < -quantile
            streak = torch.where(established, streak + 1, 0)
            called |= streak >= rule.patience
        else:
            value, variance = refreshes[-1]
            newest = torch.stack([-value, variance, torch.full_like(value, look.degrees)])
            checks = torch.cat([checks, newest[..., None]], -1)
            if number % max(1, number // _FINE):
                continue
            going = ~called
            called[going] = log_evidence(*checks[:, going]) >= -math.log(rule.false_alarms)
        if float(called.double().mean()) >= power:
            return number
    return None


def power_of_one(look: Look, refreshes: int, confidence: float) -> float:
    """Chance that the interval of one estimate of so many pooled refreshes lies below the threshold."""
    generator = torch.Generator().manual_seed(_SEED)
    t = _studentised([_refresh(look, _DRAWS, generator) for _ in range(refreshes)])
    return float((t < -student_t_quantile((1 + confidence) / 2, refreshes * look.degrees)).double().mean())


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
