r"""Change since the start: the sum over windows, with an interval for one check and one for all of them.

Given the past, each window's error has mean 0: the sum of the errors is a martingale S, and the windows' variances add
up to V. The normal mixture $|S| \le \sqrt{(V + r) \log((V + r) / (r \alpha^2))}$ holds at *all* checks of an endless
run with a probability of at least $1 - \alpha$ (Robbins 1970; Howard et al. 2021, arXiv 1810.08240, Sec. 3.2), and
with estimated variances as the prompts grow many (Waudby-Smith et al., arXiv 2103.06476, Sec. 2). For
few of them both intervals take Student's t in place of the normal, at the degrees of freedom of the summed variance:
calibrated by simulation, not proved. Windows have prompts of their own, or the intervals are of these prompts alone.
Needs torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from passk_guard.change.estimate import ChangeEstimate
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.utils.arguments import as_real
from passk_guard.utils.errors import GuardError

_TIGHTEST_AT = 20
"""Windows like the first at which the sequence is as narrow as it can be made."""


@dataclass(frozen=True)
class CurveSums:
    """Sums over the windows for pass@1 or pass@k.

    Attributes:
        total: of the changes. variance: of their squared standard errors V.
        spread: of $V_i^2 / \\nu_i$, from which V has its degrees of freedom.
        unit: the first V_i above 0, which sets the scale of the sequence before it is needed; 0 before.
    """

    total: float = 0.0
    variance: float = 0.0
    spread: float = 0.0
    unit: float = 0.0

    def plus(self, change: float, standard_error: float, degrees: float) -> CurveSums:
        """One window more."""
        variance = standard_error**2
        return CurveSums(
            total=self.total + change,
            variance=self.variance + variance,
            spread=self.spread + variance**2 / degrees,
            unit=self.unit or variance,
        )

    @property
    def degrees(self) -> float:
        """Degrees of freedom of the summed variance (Satterthwaite 1946); infinite where it is 0."""
        return self.variance**2 / self.spread if self.spread > 0 else math.inf


@dataclass(frozen=True)
class CurveChange:
    """Change of pass@1 or pass@k over some windows.

    Attributes:
        total: the sum. se: its standard error.
        ci_low, ci_high: interval for this check by itself.
        seq_low, seq_high: interval that holds at all checks together.
    """

    total: float
    se: float
    ci_low: float
    ci_high: float
    seq_low: float
    seq_high: float


@dataclass(frozen=True)
class RunChange:
    """Change since the start, or since any other beginning.

    Attributes:
        k: the k of pass@k, None before the first window. confidence: of all the intervals.
        windows: windows summed. missed: windows without an estimate, whose changes are not in the sums.
        pass_at_1, pass_at_k: the changes.
    """

    k: int | None
    windows: int
    missed: int
    confidence: float
    pass_at_1: CurveChange
    pass_at_k: CurveChange


@dataclass(frozen=True)
class ChangeSums:
    """All the memory of the sums; immutable, and plain enough for a checkpoint (`asdict`, `restored`).

    Attributes:
        k, windows, missed: as in `RunChange`. pass_at_1, pass_at_k: the sums.
    """

    k: int | None = None
    windows: int = 0
    missed: int = 0
    pass_at_1: CurveSums = field(default_factory=CurveSums)
    pass_at_k: CurveSums = field(default_factory=CurveSums)

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> ChangeSums:
        """The sums whose `asdict` this is."""
        curves = {name: CurveSums(**saved[name]) for name in ("pass_at_1", "pass_at_k")}
        return cls(**{**saved, **curves})

    def with_window(self, window: ChangeEstimate | None) -> ChangeSums:
        """One window more. None, or one with an infinite error, is missed.

        A second check of one sample replaces the first: add it to the sums from before that sample.

        Raises:
            GuardError: the window is of another k.
        """
        if window is None or not math.isfinite(window.pass_at_1_se + window.pass_at_k_se):
            return ChangeSums(self.k, self.windows, self.missed + 1, self.pass_at_1, self.pass_at_k)
        if self.k not in (None, window.k):
            raise GuardError(f"Expected windows of one `k`; found k={window.k} after k={self.k}. Begin new sums.")
        return ChangeSums(
            k=window.k,
            windows=self.windows + 1,
            missed=self.missed,
            pass_at_1=self.pass_at_1.plus(window.pass_at_1, window.pass_at_1_se, window.degrees),
            pass_at_k=self.pass_at_k.plus(window.pass_at_k, window.pass_at_k_se, window.degrees_k),
        )

    def change(self, confidence: float = 0.95) -> RunChange:
        """The change over these windows with its intervals; without any window, 0 and no width.

        Raises:
            GuardError: a confidence outside (0, 1).
        """
        alpha = 1 - as_real(confidence, "confidence")
        if not 0 < alpha < 1:
            raise GuardError(f"Expected 0 < `confidence` < 1; found {confidence}.")
        return RunChange(
            k=self.k,
            windows=self.windows,
            missed=self.missed,
            confidence=float(confidence),
            pass_at_1=_with_intervals(self.pass_at_1, alpha),
            pass_at_k=_with_intervals(self.pass_at_k, alpha),
        )


def cumulate(history: Iterable[ChangeEstimate | None], *, confidence: float = 0.95) -> RunChange:
    """The change over windows in a row, None where one has no estimate; errors as in `ChangeSums`."""
    sums = ChangeSums()
    for window in history:
        sums = sums.with_window(window)
    return sums.change(confidence)


def sequence_width(variance: float, unit: float, alpha: float, degrees: float = math.inf) -> float:
    """Half the width of the interval for all checks.

    Args:
        variance: V of the sum. unit: the variance of a typical window; the tightest sum has 20 of them.
        alpha: chance that the interval fails at any check. degrees: of freedom of V.
    """
    if not variance > 0:
        return 0.0
    # r is best at V where s = V/r solves s = log((1 + s) / alpha^2): the minimum over r of the width.
    ratio = 1.0
    for _ in range(50):
        ratio = math.log1p(ratio) - 2 * math.log(alpha)
    share = variance / (_TIGHTEST_AT * unit) * ratio
    score_sq = (1 + 1 / share) * (math.log1p(share) - 2 * math.log(alpha))
    return math.sqrt(variance * _t_square(score_sq, degrees))


def _t_square(score_sq: float, degrees: float) -> float:
    """Square of the t that has the p-value of a normal score: the inverse of Wallace (1959, Eq. 3)."""
    if math.isinf(degrees):
        return score_sq
    exponent = score_sq * ((8 * degrees + 3) / (8 * degrees + 1)) ** 2 / degrees
    return degrees * math.expm1(min(exponent, 500.0))


def _with_intervals(sums: CurveSums, alpha: float) -> CurveChange:
    se = math.sqrt(sums.variance)
    one = se * student_t_quantile(1 - alpha / 2, sums.degrees)
    every = sequence_width(sums.variance, sums.unit, alpha, sums.degrees)
    total = sums.total
    return CurveChange(total, se, total - one, total + one, total - every, total + every)
