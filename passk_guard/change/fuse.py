r"""Level and change fused: each sample's noisy level of pass@k with each window's precise change. Needs torch alone.

At sample t the level is $y_t = J_t + \nu_t$; the window after it gives $D_t = J_{t+1} - J_t + \epsilon_t$, measured on
the same completions, so that $c = cov(\nu_t, \epsilon_t) \ne 0$. Less $g y_t$ with $g = c / var(\nu_t)$, a change has
an error of its own, and the pair (level now, level at the start) follows the Kalman filter of

$$ J_{t+1} = (1 + g) J_t + (D_t - g y_t) - \epsilon'_t, \qquad var(\epsilon'_t) = var(\epsilon_t) - c^2/var(\nu_t). $$

(Anderson & Moore 1979, *Optimal Filtering*, Sec. 5.5, for correlated noises.) This is generalised least squares over
all levels and changes so far. A window without an estimate leaves the level after it unknown, and that at the start
as it was. Levels of different samples are taken to err independently, as those of different prompts do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from passk_guard.change.estimate import ChangeEstimate, LevelEstimate, MeanChange

PASS_AT_1 = "pass@1"

_UNKNOWN = 1e4
"""Variance of a rate of which nothing is known yet."""

_KNOWN = 1.0
"""A rate with a standard error beyond this is said to be unknown."""


@dataclass(frozen=True)
class FusedCurve:
    """Level now and level at the start of pass@1 or pass@k; immutable, and plain enough for a checkpoint.

    Attributes:
        now, start: the levels. now_var, start_var, cov: their variances and covariance.
        level, level_var: of the newest sample, which the next window shares its completions with; None without one.
    """

    now: float = 0.5
    start: float = 0.5
    now_var: float = _UNKNOWN
    start_var: float = _UNKNOWN
    cov: float = _UNKNOWN
    level: float | None = None
    level_var: float = 0.0

    def with_level(self, level: float, variance: float) -> FusedCurve:
        """A sample gave this level, of this variance > 0."""
        total, surprise = self.now_var + variance, level - self.now
        return FusedCurve(
            now=self.now + self.now_var / total * surprise,
            start=self.start + self.cov / total * surprise,
            now_var=self.now_var * variance / total,
            start_var=self.start_var - self.cov**2 / total,
            cov=self.cov * variance / total,
            level=level,
            level_var=variance,
        )

    def with_window(self, change: float, variance: float, level_cov: float) -> FusedCurve:
        """The policy moved on by this change, whose error has this covariance with the newest level's."""
        gain = 0.0 if self.level is None else level_cov / self.level_var
        behind = 0.0 if self.level is None else self.now - self.level
        return FusedCurve(
            now=self.now + change + gain * behind,
            start=self.start,
            now_var=(1 + gain) ** 2 * self.now_var + max(0.0, variance - gain * level_cov),
            start_var=self.start_var,
            cov=(1 + gain) * self.cov,
        )

    def with_gap(self) -> FusedCurve:
        """The policy moved on by an unknown change."""
        return replace(self, now_var=_UNKNOWN, cov=0.0, level=None, level_var=0.0)

    @property
    def change(self) -> float:
        """Level now less level at the start."""
        return self.now - self.start

    @property
    def now_se(self) -> float:
        """Standard error of `now`; infinite while nothing is known of it."""
        return _error(self.now_var)

    @property
    def change_se(self) -> float:
        """Standard error of `change`; infinite while nothing is known of it."""
        return _error(self.now_var + self.start_var - 2 * self.cov)


@dataclass(frozen=True)
class Fused:
    """The fused curves of a run: `with_level` at each sample, `with_window` when its window closes.

    A second check of one sample replaces the first: go on from the state before the first check. The state survives a
    checkpoint by `asdict` and `restored`.

    Attributes:
        pass_at_1, pass_at_k: the curves.
    """

    pass_at_1: FusedCurve = field(default_factory=FusedCurve)
    pass_at_k: FusedCurve = field(default_factory=FusedCurve)

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Fused:
        """The state whose `asdict` this is."""
        return cls(FusedCurve(**saved["pass_at_1"]), FusedCurve(**saved["pass_at_k"]))

    def with_level(self, level: LevelEstimate | None) -> Fused:
        """A new sample; None for one without levels.

        Where no prompt differs from another the standard error is 0 and says nothing: m prompts never count as more
        precise than 1/m.
        """
        if level is None:
            return self
        one = max(level.level_1_se, 1 / level.num_prompts) ** 2
        many = max(level.level_k_se, 1 / level.num_prompts_k) ** 2
        return Fused(
            self.pass_at_1.with_level(level.level_1, one),
            self.pass_at_k.with_level(level.level_k, many),
        )

    def with_window(self, window: ChangeEstimate | None) -> Fused:
        """The window after the newest sample; None, or an infinite error, for one without an estimate."""
        if window is None or not math.isfinite(window.pass_at_1_se + window.pass_at_k_se):
            return Fused(self.pass_at_1.with_gap(), self.pass_at_k.with_gap())
        one, many = window.pass_at_1_se**2, window.pass_at_k_se**2
        return Fused(
            self.pass_at_1.with_window(window.pass_at_1, one, window.level_1_change_cov),
            self.pass_at_k.with_window(window.pass_at_k, many, window.level_k_change_cov),
        )


@dataclass(frozen=True)
class HeldCurve:
    """The level of what `mitigation="hold"` keeps, on a scale of about 1; immutable, and plain enough for a checkpoint.

    Attributes:
        name: "pass@1", or of a reward function.
        low, scale: the level is low + scale times that of the curve. scale is 0 before the first sample.
        curve: fused, in these units.
    """

    name: str = PASS_AT_1
    low: float = 0.0
    scale: float = 1.0
    curve: FusedCurve = field(default_factory=FusedCurve)

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> HeldCurve:
        """The state whose `asdict` this is."""
        return cls(**{**saved, "curve": FusedCurve(**saved["curve"])})

    def on_the_scale_of(self, values: Tensor) -> HeldCurve:
        """The first sample's range is mapped to [0, 1], unless it lies there; later ones are mapped as the first."""
        if self.scale or not values.numel():
            return self
        low, high = (float(end) for end in values.aminmax())
        within = (low >= 0 and high <= 1) or low == high
        return replace(self, low=0.0 if within else low, scale=1.0 if within else high - low)

    def units(self, value: Tensor) -> Tensor:
        """Values on the scale of the curve."""
        return (value - self.low) / self.scale

    def with_level(self, found: MeanChange) -> HeldCurve:
        """A new sample, whose prompts never count as more precise than 1/m."""
        return replace(self, curve=self.curve.with_level(found.level, max(found.level_se, 1 / found.num_prompts) ** 2))

    def with_window(self, found: MeanChange | None) -> HeldCurve:
        """The window after the newest sample; None, or an infinite error, for one without an estimate."""
        if found is None or not math.isfinite(found.change_se):
            return replace(self, curve=self.curve.with_gap())
        return replace(self, curve=self.curve.with_window(found.change, found.change_se**2, found.level_change_cov))


def _error(variance: float) -> float:
    return math.sqrt(max(0.0, variance)) if variance < _KNOWN else math.inf
