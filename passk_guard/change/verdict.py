"""From realised changes to a verdict on the outcome: a pure state machine. Needs nothing of the stack."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from passk_guard.change.cumulate import ChangeSums, RunChange
from passk_guard.change.estimate import ChangeEstimate
from passk_guard.utils.arguments import as_real
from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import brief

Outcome = Literal["losing", "holding", "gaining", "undetermined"]


@dataclass(frozen=True)
class OutcomeRule:
    """How much it takes.

    Attributes:
        confidence: of the intervals; a run in which pass@1 never falls is called LOSING with a chance of at most
            1 - confidence.
        cooldown: windows in a row whose change since the loss began is no longer established to be below 0, after
            which LOSING is dropped.
        tolerance: pass@1 is HOLDING when its change since the start is known to lie within this much of 0.
        max_loss: a loss of pass@1 since the start that is not to be exceeded; None for none.
    """

    confidence: float = 0.95
    cooldown: int = 3
    tolerance: float = 0.02
    max_loss: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.cooldown, int) or self.cooldown < 1:
            raise GuardError(f"Expected a whole number `cooldown` >= 1; found {brief(self.cooldown)}.")
        if not 0 < as_real(self.confidence, "confidence") < 1:
            raise GuardError(f"Expected 0 < `confidence` < 1; found {self.confidence}.")
        for name in ("tolerance", "max_loss"):
            value = getattr(self, name)
            if not (value is None and name == "max_loss") and not 0 < as_real(value, name) < 1:
                raise GuardError(f"Expected 0 < `{name}` < 1, a difference of two pass rates; found {value}.")


@dataclass(frozen=True)
class OutcomeState:
    """All the memory of the verdict; immutable, and plain enough for a checkpoint (`asdict`, `restored`).

    Attributes:
        outcome: the standing verdict.
        falling: sums since pass@1 was last highest by the sum of its changes: where a loss began, if there is one.
        recovered: windows in a row that speak for an end of the loss.
        exceeded: whether the loss was established to exceed `max_loss`.
    """

    outcome: Outcome = "undetermined"
    falling: ChangeSums = field(default_factory=ChangeSums)
    recovered: int = 0
    exceeded: bool = False

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> OutcomeState:
        """The state whose `asdict` this is."""
        return cls(**{**saved, "falling": ChangeSums.restored(saved["falling"])})


@dataclass(frozen=True)
class OutcomeVerdict:
    """The verdict after a window.

    Attributes:
        outcome: the standing verdict. previous: the one before.
        reason: one sentence; why, and what to do where nothing is determined.
        loss: the change since pass@1 was last highest. That beginning was chosen by looking, so its intervals
            describe; what vouches for LOSING is the p-value.
        exceeded: the sequence since the start lies below -`max_loss`. newly: and it did not before.
    """

    outcome: Outcome
    previous: Outcome
    reason: str
    loss: RunChange
    exceeded: bool = False
    newly: bool = False

    @property
    def changed(self) -> bool:
        """Whether this window changed the verdict. Out of LOSING, the evidence of the run is to be restarted."""
        return self.outcome != self.previous


def judge(
    state: OutcomeState, window: ChangeEstimate | None, run: RunChange, p_value: float, rule: OutcomeRule
) -> tuple[OutcomeState, OutcomeVerdict]:
    """Advance the verdict by one window; pure, so that a resumed run repeats it exactly.

    LOSING begins when the evidence of the whole run establishes that pass@1 is falling, and ends after
    `rule.cooldown` windows in a row at which the change since the loss began is no longer established to be below 0.
    HOLDING takes an interval since the start within the tolerance, and not below 0. GAINING takes a sequence above 0.

    Args:
        state: the state so far.
        window: the newest one, or None where it has no estimate: nothing advances.
        run: the change since the start, this window included.
        p_value: of "pass@1 is not falling" over the whole run, valid at all checks.
        rule: how much it takes.

    Raises:
        GuardError: the p-value is not in [0, 1].
    """
    if not 0 <= as_real(p_value, "p_value") <= 1:
        raise GuardError(f"Expected 0 <= `p_value` <= 1; found {p_value}.")
    falling = state.falling.with_window(window)
    if falling.pass_at_1.total >= 0 and falling.windows:
        falling = ChangeSums(falling.k)
    loss = falling.change(rule.confidence)
    if window is None:
        outcome, recovered, reason = state.outcome, state.recovered, "This window has no estimate: the verdict stands."
    elif state.outcome == "losing":
        recovered = 0 if loss.pass_at_1.ci_high < 0 else state.recovered + 1
        ended = recovered >= rule.cooldown
        outcome, reason = _without_alarm(run, rule) if ended else ("losing", _loss_in_words(loss))
        recovered, falling = (0, ChangeSums(falling.k)) if ended else (recovered, falling)
    elif p_value <= 1 - rule.confidence:
        outcome, recovered, reason = "losing", 0, f"{_loss_in_words(loss)} p = {p_value:.2g} over the whole run."
    else:
        recovered, (outcome, reason) = 0, _without_alarm(run, rule)
    exceeded = rule.max_loss is not None and run.windows > 0 and run.pass_at_1.seq_high < -rule.max_loss
    after = replace(state, outcome=outcome, falling=falling, recovered=recovered, exceeded=exceeded)
    newly = exceeded and not state.exceeded
    return after, OutcomeVerdict(outcome, state.outcome, reason, loss, exceeded, newly)


def _without_alarm(run: RunChange, rule: OutcomeRule) -> tuple[Outcome, str]:
    change = run.pass_at_1
    low, high = change.ci_low, change.ci_high
    found = f"The change of pass@1 since the start is {change.total:+.3f} [{low:+.3f}, {high:+.3f}]"
    found += missed_in_words(run.missed)
    if not run.windows:
        return "undetermined", "No window has an estimate yet: wait for the next refresh."
    if -rule.tolerance <= low and 0 <= high <= rule.tolerance:
        return "holding", f"{found}, within {rule.tolerance:g} of 0."
    if change.seq_low > 0:
        return "gaining", f"{found}, and above 0 by the interval for all checks."
    half = (high - low) / 2
    if half > rule.tolerance:
        times = math.ceil((half / rule.tolerance) ** 2)
        advice = f"it takes about {times} times the prompts to tell a change of {rule.tolerance:g}"
    else:
        advice = "it is neither within the tolerance nor established: wait for more windows"
    return "undetermined", f"{found}: {advice}."


def _loss_in_words(loss: RunChange) -> str:
    change = loss.pass_at_1
    return (
        f"pass@1 {change.total:+.3f} [{change.ci_low:+.3f}, {change.ci_high:+.3f}] over {loss.windows} windows since "
        f"it was highest{missed_in_words(loss.missed)}."
    )


def missed_in_words(count: int) -> str:
    """What a total leaves out; nothing where no window was missed."""
    return f" ({count} {'window' if count == 1 else 'windows'} missed)" if count else ""
