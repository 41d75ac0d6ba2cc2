r"""Keep pass@1 where it was while pass@k is raised: the multiplier of a constraint, set from the measured change.

"Raise J_k, keep J_1" has the Lagrangian $J_k + \lambda J_1$. So a run trains on the advantages $A_k + \lambda A_1$,
divided by $\lambda$ where it is above 1: a large one turns the step and does not lengthen it. A PID rule moves
$\lambda \ge 0$ (PID Lagrangian: Stooke et al. 2020, arXiv 2007.03964, Sec. 4). With the shortfall
$e = \text{target} - (\hat J_1 - s/2)$, where s is the standard error of the estimate, and the smoothed rate v of pass@1
per step, after a window of h steps

$$ I \leftarrow [I + \kappa k_i h e]_0^{5}, \qquad \lambda = [I + \kappa (k_p e - k_d v)]_0^{5}. $$

The part $k_p e - k_d v$ counts a quarter where it is negative: without that share, a lead of some hundredths lowers
$\lambda$ to 0 at once, and the next window loses more than the lead (docs/hold.md). Where e < 0, I falls by the
factor $\exp(2 \kappa k_i h e)$ at least: above 0.5 in proportion to itself.

$\kappa \le 1$ keeps the loop stable where steps are large: two windows whose $\lambda$ differed say how much pass@1
moves in a window for each unit of $\lambda$, and $\kappa k_p$ is at most 0.6 over that. Needs torch alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from passk_guard.change import ChangeEstimate, FusedCurve, MeanChange
from passk_guard.estimation.estimate import estimate_pooled
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.estimation.records import ProbeGram
from passk_guard.utils.arguments import as_real
from passk_guard.utils.errors import GuardError

_STABLE = 0.6  # of the change that undoes a shortfall within one window
_MOVED = 0.1  # a difference of lambda that is large enough to measure its effect by
_STRONGEST = 0.3  # effect of lambda that is believed: pass@1 may have fallen by itself
_FORGET = 0.8  # of the largest effect seen, a window
_LARGE = 0.5  # lambda above which a lead of pass@1 takes a share of it
_SMOOTH = 0.5  # share of the newest window in the rate
_PATIENCE = 1  # missed checks before lambda decays


@dataclass(frozen=True)
class HoldState:
    """All the memory of the controller; immutable, and plain enough for a checkpoint (`asdict`).

    Attributes:
        multiplier: lambda in force.
        trusted: I, the part of it that was learned over many windows.
        rate: smoothed change of pass@1 a step.
        change, multiplier_then: change of the newest window, and lambda during it; None before the first one.
        effect: change of pass@1 in a window for each unit of lambda; 0 before it is known.
        missed: checks in a row without a measurement.
        cause: why lambda is what it is.
    """

    multiplier: float = 0.0
    trusted: float = 0.0
    rate: float = 0.0
    change: float | None = None
    multiplier_then: float | None = None
    effect: float = 0.0
    missed: int = 0
    cause: str = ""


@dataclass(frozen=True)
class HoldMeasurement:
    """Pass@1 against its target, and the newest window.

    Attributes:
        above: pass@1 less the level to hold. above_se: its standard error.
        change: of pass@1 in the newest window. change_se: its standard error.
        steps: optimizer steps of that window.
    """

    above: float
    above_se: float
    change: float
    change_se: float
    steps: int

    @classmethod
    def of(
        cls, fused: FusedCurve, window: ChangeEstimate | MeanChange | None, steps: int, level: float | None = None
    ) -> HoldMeasurement | None:
        """From the fused curve of pass@1 after a window; None where window or level are unknown.

        Args:
            fused: which must not contain completions that steer themselves: add the next sample's level afterwards.
            window: the newest one.
            steps: of the window.
            level: to hold; None for that at the start.
        """
        above = (fused.change, fused.change_se) if level is None else (fused.now - level, fused.now_se)
        if isinstance(window, ChangeEstimate):
            change = window.pass_at_1, window.pass_at_1_se
        elif window is not None:
            change = window.change, window.change_se
        if window is None or steps < 1 or not math.isfinite(above[1] + change[1]):
            return None
        return cls(*above, *change, steps)


@dataclass(frozen=True)
class HoldController:
    """Moves lambda so that pass@1 stays at its target; `step` is pure.

    Attributes:
        tolerance: loss of pass@1 that is accepted, in [0, 1).
        start: lambda where no angle says anything.
        caution: standard errors by which the estimate of pass@1 is lowered.
        proportional: k_p, lambda for each unit of pass@1. integral: k_i, of that for each step.
        derivative: k_d, lambda for each unit of pass@1 a step.
        release: share of what k_p and k_d answer that lowers lambda below I.
        largest: lambda at most.

    Raises:
        GuardError: a tolerance outside [0, 1), or another number that is negative.
    """

    tolerance: float = 0.0
    start: float = 0.5
    caution: float = 0.5
    proportional: float = 8.0
    integral: float = 0.2
    derivative: float = 20.0
    release: float = 0.25
    largest: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= as_real(self.tolerance, "tolerance") < 1:
            raise GuardError(f"Expected 0 <= `tolerance` < 1, a difference of pass rates; found {self.tolerance}.")
        for name in ("start", "caution", "proportional", "integral", "derivative", "release", "largest"):
            if not 0 <= as_real(getattr(self, name), name) < math.inf:
                raise GuardError(f"Expected `{name}` >= 0 and finite; found {getattr(self, name)}.")

    def begin(self, first: float | None = None) -> HoldState:
        """The state before the first window, with `first` of `first_multiplier` where it knows one."""
        value = min(self.largest, self.start if first is None else max(0.0, first))
        return HoldState(value, value, cause="start" if first is None else "angle")

    def step(self, state: HoldState, measured: HoldMeasurement | None) -> HoldState:
        """The state after one more check.

        Args:
            state: before.
            measured: None where the check failed. The first such check leaves lambda, and each further one moves it
                half way to `trusted`.
        """
        if measured is None:
            missed = state.missed + 1
            if missed <= _PATIENCE:
                return replace(state, missed=missed, cause="no measurement: held")
            value = (state.multiplier + state.trusted) / 2
            return replace(state, multiplier=value, missed=missed, rate=0.0, cause="no measurement: towards trusted")
        effect = self._effect(state, measured)
        gain = min(1.0, _STABLE / (self.proportional * effect)) if self.proportional * effect > 0 else 1.0
        shortfall = -self.tolerance + self.caution * measured.above_se - measured.above
        rate = state.rate + _SMOOTH * (measured.change / measured.steps - state.rate)
        moved = gain * self.integral * measured.steps * shortfall
        fallen = state.trusted * math.exp(min(0.0, moved) / _LARGE)  # of a large lambda a share, not an amount
        trusted = self._within(state.trusted + moved if moved > 0 else min(state.trusted + moved, fallen))
        answer = gain * (self.proportional * shortfall - self.derivative * rate)
        value = self._within(trusted + (answer if answer > 0 else self.release * answer))
        cause = "pass@1 is short of its level" if shortfall > 0 else "pass@1 is above its level"
        return HoldState(value, trusted, rate, measured.change, state.multiplier, effect, 0, cause)

    def _effect(self, state: HoldState, measured: HoldMeasurement) -> float:
        """The largest effect of lambda seen of late, less what noise alone would show."""
        if state.change is None or state.multiplier_then is None:
            return state.effect
        moved = state.multiplier - state.multiplier_then
        if abs(moved) <= _MOVED:
            return state.effect
        differs = math.copysign(1.0, moved) * (measured.change - state.change)  # below 0 where something else did it
        found = (differs - 3 * measured.change_se) / abs(moved)
        return min(_STRONGEST, max(_FORGET * state.effect, found, 0.0))

    def _within(self, value: float) -> float:
        return min(self.largest, max(0.0, value))


def first_multiplier(probe: ProbeGram, k: int, *, confidence: float = 0.8413) -> float | None:
    r"""The lambda at which the first step does not lower pass@1, from the angle: $-U_{k1} / U_{11}$.

    $\langle \nabla J_k + \lambda \nabla J_1, \nabla J_1 \rangle \ge 0$ from there on. U_k1 is lowered to the end of its
    one-sided interval: a lambda that is too large costs little, and is released.

    Args:
        probe: of prompts that are not measured by the next window.
        k: of pass@k.
        confidence: of the interval; the default is one standard error.

    Returns:
        At least 0. None where the probe does not know it to within 1.
    """
    try:
        found = estimate_pooled([probe], k, curve=False)
    except GuardError:
        return None
    inner, error, norm_sq = found.inner_product, found.inner_product_se, found.norm1_sq
    if inner is None or error is None or norm_sq is None:
        return None
    margin = float(student_t_quantile(confidence, found.degrees or max(1, found.num_informative - 1))) * error
    return max(0.0, (margin - inner) / norm_sq) if norm_sq > 0 and margin <= norm_sq else None


def part_of(probe: ProbeGram, rows: torch.Tensor) -> ProbeGram:
    """The probe of these prompts alone; `rows` is [m] bool."""
    both = torch.cat([rows, rows])
    keys = [key for key, kept in zip(probe.prompt_keys, rows.tolist(), strict=False) if kept]
    return ProbeGram(probe.gram[both][:, both], probe.num_samples[rows], probe.num_correct[rows], keys)
