"""From estimates to verdicts that do not flap: a pure state machine. Needs nothing of the stack."""

from __future__ import annotations

from dataclasses import dataclass, replace

from passk_guard.errors import GuardError
from passk_guard.types import ConflictEstimate, Status


@dataclass(frozen=True)
class DecisionRule:
    """When a status becomes a verdict.

    Attributes:
        patience: consecutive refreshes that must agree before the verdict changes.
        cooldown: consecutive refreshes without an established conflict before a CONFLICT verdict is dropped.
            Larger than `patience`, it keeps noise around the threshold from switching the alarm off and on.
    """

    patience: int = 2
    cooldown: int = 3

    def __post_init__(self) -> None:
        for name in ("patience", "cooldown"):
            if getattr(self, name) < 1:
                raise GuardError(f"Expected `{name}` >= 1; found {getattr(self, name)}.")


@dataclass(frozen=True)
class DecisionState:
    """All the memory of the decision; immutable, and plain enough for a checkpoint.

    Attributes:
        verdict: the standing verdict; "undetermined" before the first estimates.
        candidate: the status that is gathering agreement, None when the last estimate confirmed the verdict.
        streak: consecutive refreshes that support the candidate.
    """

    verdict: Status = "undetermined"
    candidate: Status | None = None
    streak: int = 0


@dataclass(frozen=True)
class Verdict:
    """The standing verdict after an estimate.

    Attributes:
        status: the standing verdict.
        previous: the verdict before this estimate.
        changed: whether this estimate changed it.
    """

    status: Status
    previous: Status

    @property
    def changed(self) -> bool:
        return self.status != self.previous


def step(
    state: DecisionState, estimate: ConflictEstimate | Status, rule: DecisionRule
) -> tuple[DecisionState, Verdict]:
    """Advance the decision by one estimate; pure, so that a resumed run repeats it exactly.

    A new status must hold for `patience` refreshes in a row. Out of CONFLICT it takes `cooldown` refreshes in a
    row without an established conflict, whichever of the other two they say. A void refresh is no estimate: do not
    call this for it.

    Args:
        state: the state so far.
        estimate: the newest estimate, or its status alone.
        rule: patience and cooldown.

    Returns:
        The next state and the verdict to act on.
    """
    status: Status = estimate if isinstance(estimate, str) else estimate.status
    if status == state.verdict:
        return replace(state, candidate=None, streak=0), Verdict(state.verdict, state.verdict)
    in_conflict = state.verdict == "conflict"
    agrees = state.candidate is not None and (in_conflict or status == state.candidate)
    streak = state.streak + 1 if agrees else 1
    if streak < (rule.cooldown if in_conflict else rule.patience):
        return replace(state, candidate=status, streak=streak), Verdict(state.verdict, state.verdict)
    return DecisionState(verdict=status), Verdict(status, state.verdict)
