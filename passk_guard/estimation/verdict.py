"""From estimates to verdicts that do not flap: a pure state machine. Needs nothing of the stack."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from passk_guard.estimation.evidence import Check, RunEvidence
from passk_guard.estimation.records import ConflictEstimate, Status
from passk_guard.utils.arguments import as_real
from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import brief


@dataclass(frozen=True)
class DecisionRule:
    """When a status becomes a verdict.

    Attributes:
        patience: consecutive refreshes that must agree before the verdict changes.
        cooldown: consecutive refreshes without an established conflict before a CONFLICT verdict is dropped.
            Larger than `patience`, it keeps noise around the threshold from switching the alarm off and on.
        false_alarms: bound on the chance that a run in which there is never a conflict is called one at any of its
            checks, by `RunEvidence`; None leaves CONFLICT to `patience`, which bounds each look by itself.
    """

    patience: int = 2
    cooldown: int = 3
    false_alarms: float | None = None

    def __post_init__(self) -> None:
        for name in ("patience", "cooldown"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise GuardError(f"Expected a whole number `{name}` >= 1; found {brief(value)}.")
        if self.false_alarms is not None and not 0 < as_real(self.false_alarms, "false_alarms") < 1:
            raise GuardError(f"Expected 0 < `false_alarms` < 1, or None; found {self.false_alarms}.")


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


def decide(
    state: DecisionState,
    evidence: RunEvidence,
    estimate: ConflictEstimate,
    check: Check | None,
    rule: DecisionRule,
    *,
    fresh: bool = True,
) -> tuple[DecisionState, RunEvidence, Verdict]:
    """Advance the decision and the evidence of the run by one refresh; pure, so that a resumed run repeats it exactly.

    With `rule.false_alarms`, a CONFLICT begins at the look at which the evidence of the run establishes one, without
    patience, and stands while the pooled estimate is below the threshold; `cooldown` refreshes in a row that are not
    end it. Its end restarts the evidence. Without `rule.false_alarms`, this is `step`.

    Args:
        state, evidence: so far.
        estimate: the pooled one of this refresh.
        check: `conflict_check` of this refresh alone, or None where it has none.
        rule: how much evidence it takes.
        fresh: False for an estimate from samples of an earlier refresh, which neither confirm nor contradict what was
            said of them: nothing advances, by either rule.

    Returns:
        The next state, the next evidence, and the verdict to act on.
    """
    if not fresh:
        return state, evidence, Verdict(state.verdict, state.verdict)
    evidence = evidence.with_check(check)
    if rule.false_alarms is None:
        state, verdict = step(state, estimate, rule)
        return state, evidence, verdict
    if state.verdict != "conflict":
        if evidence.p_value <= rule.false_alarms:
            return DecisionState(verdict="conflict"), evidence, Verdict("conflict", state.verdict)
        status: Status = "undetermined" if estimate.status == "conflict" else estimate.status
    else:
        status = "conflict" if _below(estimate) else estimate.status
    state, verdict = step(state, status, rule)
    return state, evidence.restarted() if verdict.changed and verdict.previous == "conflict" else evidence, verdict


def _below(estimate: ConflictEstimate) -> bool:
    """Whether the pooled cosine is below the threshold; where no number is shown, whether the inner product is."""
    if estimate.cosine is not None:
        return estimate.cosine < estimate.threshold
    if estimate.inner_product is None:
        return False
    length = math.sqrt(max(0.0, estimate.norm1_sq or 0.0) * max(0.0, estimate.normk_sq or 0.0))
    return estimate.inner_product < estimate.threshold * length


def step(
    state: DecisionState, estimate: ConflictEstimate | Status, rule: DecisionRule
) -> tuple[DecisionState, Verdict]:
    """Advance the decision by one estimate; pure, so that a resumed run repeats it exactly.

    A new status must hold for `patience` refreshes in a row. Out of CONFLICT it takes `cooldown` refreshes in a
    row without an established conflict, whichever of the other two they say. A failed refresh is no estimate: do
    not call this for it.

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
