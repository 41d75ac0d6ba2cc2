"""Any sequence of checks keeps the state of a decision and the evidence of a run consistent."""

import dataclasses
import math

from hypothesis import example, given
from hypothesis import strategies as st

from passk_guard import GuardError
from passk_guard.estimation.evidence import LARGEST_SCORE, RunEvidence, normal_score
from passk_guard.estimation.records import ConflictEstimate
from passk_guard.estimation.verdict import DecisionRule, DecisionState, decide, step
from tests.fuzz.strategies import NUMBER, SCALAR

STATUS = st.sampled_from(["clear", "conflict", "undetermined"])
SCORE = st.one_of(st.none(), st.floats(-5, 5), st.sampled_from([-math.inf, -1e300, -1e12, -1e8, math.inf, 1e300]))
RULE = st.builds(DecisionRule, st.integers(1, 4), st.integers(1, 4), st.one_of(st.none(), st.sampled_from([0.05, 0.3])))


def estimate(status, cosine):
    return ConflictEstimate(4, status, "", 0.95, 0.0, 8, 8, 1, cosine=cosine)


CHECKS = st.lists(st.tuples(STATUS, st.one_of(st.none(), st.floats(-1, 1)), SCORE, st.booleans()), max_size=40)


@given(RULE, CHECKS)
def test_any_sequence_of_checks(rule, checks):
    state, evidence, before = DecisionState(), RunEvidence(), "undetermined"
    counted = 0
    for status, cosine, score, fresh in checks:
        given_state = dataclasses.asdict(state)
        new, grown, verdict = decide(state, evidence, estimate(status, cosine), score, rule, fresh=fresh)
        assert dataclasses.asdict(state) == given_state
        assert decide(state, evidence, estimate(status, cosine), score, rule, fresh=fresh) == (new, grown, verdict)
        assert verdict.previous == before
        assert verdict.changed == (verdict.status != before)
        assert new.verdict == verdict.status
        assert 0 <= new.streak < max(rule.patience, rule.cooldown)
        assert (new.candidate is None) == (new.streak == 0)
        counted += fresh and score is not None
        assert grown.before + len(grown.scores) == counted
        assert all(value <= LARGEST_SCORE for value in grown.scores)
        assert 0 <= grown.p_value <= 1
        assert fresh or (new, grown) == (state, evidence)
        if verdict.changed and verdict.status == "conflict" and rule.false_alarms is not None:
            assert grown.p_value <= rule.false_alarms
        if rule.false_alarms is not None and verdict.changed and verdict.previous == "conflict":
            assert grown.scores == ()
        state, evidence, before = new, grown, verdict.status


@given(st.lists(st.one_of(st.floats(-400, 400), SCORE), min_size=1, max_size=60), st.integers(0, 10**6))
@example([-1e12], 0)
@example([-1e8, 3.0], 0)
@example([-math.inf, 1.0], 0)
def test_scores_against_a_conflict_are_no_evidence(scores, before):
    """Rounding gives no small p-value, however far the scores lie on the other side."""
    evidence = RunEvidence((), before)
    for score in scores:
        evidence = evidence.with_score(score)
        assert 0 <= evidence.p_value <= 1
    if all(score is None or score <= 0 for score in scores):
        assert evidence.p_value == 1


@given(st.floats(allow_nan=False), st.floats(2, 1e6))
def test_a_score_is_finite_and_has_the_sign_of_its_statistic(t, degrees):
    score = normal_score(t, degrees)
    assert math.isfinite(score)
    assert score * t >= 0


@given(st.one_of(st.just(math.nan), SCALAR, NUMBER))
def test_any_score(score):
    try:
        evidence = RunEvidence().with_score(score)
    except GuardError:
        return
    assert score is None or not math.isnan(score)
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
