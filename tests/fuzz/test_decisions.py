"""Any sequence of checks keeps the state of a decision and the evidence of a run consistent."""

import dataclasses
import math

from hypothesis import example, given
from hypothesis import strategies as st

from passk_guard import GuardError
from passk_guard.estimation.evidence import Check, RunEvidence
from passk_guard.estimation.records import ConflictEstimate
from passk_guard.estimation.verdict import DecisionRule, DecisionState, decide, step
from tests.fuzz.strategies import NUMBER, SCALAR

STATUS = st.sampled_from(["clear", "conflict", "undetermined"])
VALUE = st.one_of(st.floats(-5, 5), st.sampled_from([-1e300, -1e12, -1e8, 1e300]))
VARIANCE = st.one_of(st.floats(0.01, 10), st.sampled_from([0.0, 5e-324, 1e-300, 1e-12, 1e12, 1e300]))
CHECK = st.one_of(st.none(), st.builds(Check, VALUE, VARIANCE, st.one_of(st.floats(1, 100), st.just(1e300))))
RULE = st.builds(DecisionRule, st.integers(1, 4), st.integers(1, 4), st.one_of(st.none(), st.sampled_from([0.05, 0.3])))


def estimate(status, cosine):
    return ConflictEstimate(4, status, "", 0.95, 0.0, 8, 8, 1, cosine=cosine)


CHECKS = st.lists(st.tuples(STATUS, st.one_of(st.none(), st.floats(-1, 1)), CHECK, st.booleans()), max_size=40)


@given(RULE, CHECKS)
def test_any_sequence_of_checks(rule, checks):
    state, evidence, before = DecisionState(), RunEvidence(), "undetermined"
    counted = 0
    for status, cosine, check, fresh in checks:
        given_state = dataclasses.asdict(state)
        new, grown, verdict = decide(state, evidence, estimate(status, cosine), check, rule, fresh=fresh)
        assert dataclasses.asdict(state) == given_state
        assert decide(state, evidence, estimate(status, cosine), check, rule, fresh=fresh) == (new, grown, verdict)
        assert verdict.previous == before
        assert verdict.changed == (verdict.status != before)
        assert new.verdict == verdict.status
        assert 0 <= new.streak < max(rule.patience, rule.cooldown)
        assert (new.candidate is None) == (new.streak == 0)
        counted += fresh and check is not None and check.variance > 0
        assert grown.before + len(grown.checks) == counted
        assert 0 <= grown.p_value <= 1
        assert fresh or (new, grown) == (state, evidence)
        if verdict.changed and verdict.status == "conflict" and rule.false_alarms is not None:
            assert grown.p_value <= rule.false_alarms
        if rule.false_alarms is not None and verdict.changed and verdict.previous == "conflict":
            assert grown.checks == ()
        state, evidence, before = new, grown, verdict.status


@given(st.lists(CHECK, min_size=1, max_size=60), st.integers(0, 10**6))
@example([Check(-1e12, 1.0, 9)], 0)
@example([Check(-1e8, 1.0, 9), Check(3.0, 1.0, 9)], 0)
@example([Check(-1e300, 1e-300, 1), Check(1.0, 1e300, 1)], 0)
def test_the_evidence_of_values_against_a_conflict_is_none(checks, before):
    """However far values lie on the other side, and however their variances jump, rounding makes no p-value of them."""
    evidence = RunEvidence((), before)
    for check in checks:
        evidence = evidence.with_check(check)
        assert 0 <= evidence.p_value <= 1
    if all(check is None or check.value <= 0 for check in checks):
        assert evidence.p_value == 1


@given(*[st.one_of(st.just(math.nan), SCALAR, NUMBER)] * 3)
def test_any_check(value, variance, count):
    try:
        evidence = RunEvidence().with_check(Check(value, variance, count))
    except GuardError:
        return
    assert all(math.isfinite(number) for check in evidence.checks for number in vars(check).values())
    assert 0 <= evidence.p_value <= 1


@given(st.one_of(SCALAR, NUMBER), st.one_of(SCALAR, NUMBER), st.one_of(SCALAR, NUMBER))
def test_any_rule(patience, cooldown, false_alarms):
    try:
        rule = DecisionRule(patience, cooldown, false_alarms)
    except GuardError:
        return
    state, verdict = step(DecisionState(), "clear", rule)
    assert verdict.changed == (rule.patience == 1)
    assert state.streak <= rule.patience
