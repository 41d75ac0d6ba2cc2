"""The decision: pure, patient, and not to be flapped by noise."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passk_guard import GuardError
from passk_guard.estimation.verdict import DecisionRule, DecisionState, step

STATUS = st.sampled_from(["clear", "conflict", "undetermined"])


def run(statuses, rule, state=None):
    state, verdicts = state or DecisionState(), []
    for status in statuses:
        state, verdict = step(state, status, rule)
        verdicts.append(verdict)
    return state, verdicts


def changes(verdicts):
    return [(i, v.status) for i, v in enumerate(verdicts) if v.changed]


def test_conflict_after_patience():
    _, verdicts = run(["conflict"] * 4, DecisionRule(patience=3))
    assert changes(verdicts) == [(2, "conflict")]


def test_an_interrupted_streak_starts_again():
    _, verdicts = run(["conflict", "clear", "conflict", "conflict"], DecisionRule(patience=2))
    assert changes(verdicts) == [(3, "conflict")]


def test_conflict_ends_after_cooldown_whatever_replaces_it():
    statuses = ["conflict"] * 2 + ["undetermined", "clear", "clear"]
    _, verdicts = run(statuses, DecisionRule(patience=2, cooldown=3))
    assert changes(verdicts) == [(1, "conflict"), (4, "clear")]


def test_noise_across_the_threshold_does_not_flap():
    statuses = ["conflict", "conflict"] + ["undetermined", "conflict", "undetermined", "undetermined", "conflict"] * 20
    _, verdicts = run(statuses, DecisionRule(patience=2, cooldown=3))
    assert changes(verdicts) == [(1, "conflict")]


@given(st.lists(STATUS, max_size=40), st.integers(0, 40), st.integers(1, 4), st.integers(1, 4))
def test_resuming_in_the_middle_changes_nothing(statuses, cut, patience, cooldown):
    rule = DecisionRule(patience, cooldown)
    _, whole = run(statuses, rule)
    state, first = run(statuses[:cut], rule)
    stored = DecisionState(**dataclasses.asdict(state))
    _, second = run(statuses[cut:], rule, stored)
    assert whole == first + second


@given(st.lists(STATUS, max_size=60), st.integers(1, 4), st.integers(1, 4))
def test_verdicts_change_only_on_evidence(statuses, patience, cooldown):
    _, verdicts = run(statuses, DecisionRule(patience, cooldown))
    for i, status in changes(verdicts):
        left = verdicts[i].previous
        needed = cooldown if left == "conflict" else patience
        window = statuses[i + 1 - needed : i + 1]
        assert len(window) == needed
        assert status == statuses[i]
        assert all(s != left for s in window)
        if left != "conflict":
            assert set(window) == {status}


def test_state_is_immutable():
    state = DecisionState()
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.streak = 1


def test_misuse():
    with pytest.raises(GuardError, match="patience"):
        DecisionRule(patience=0)
