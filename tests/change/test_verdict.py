"""The verdict on the outcome: when it begins, when it ends, and what it says."""

import dataclasses
import json

import pytest
import torch

from passk_guard import GuardError
from passk_guard.change import ChangeEstimate, ChangeSums, LevelEstimate, OutcomeRule, OutcomeState, judge


def window(change, se=0.004):
    level = LevelEstimate(0.5, 0.05, 0.8, 0.04, 64, 64)
    none = torch.empty(0)
    return ChangeEstimate(8, change, se, 0.01, 0.01, 60.0, 60.0, 0.99, 64, 64, level, 0.0, 0.0, none, none)


def judged(changes, p_values, rule=None, state=None, se=0.004):
    """Outcomes after each window, and the last state and verdict; None for a window without an estimate."""
    rule, state, sums, outcomes, verdict = rule or OutcomeRule(), state or OutcomeState(), ChangeSums(), [], None
    for change, p in zip(changes, p_values, strict=True):
        newest = None if change is None else window(change, se)
        sums = sums.with_window(newest)
        state, verdict = judge(state, newest, sums.change(rule.confidence), p, rule)
        outcomes.append(verdict.outcome)
    return outcomes, state, verdict


def test_losing_begins_with_the_evidence_of_the_run_and_counts_from_where_pass_at_1_was_highest():
    outcomes, _, verdict = judged([0.03, -0.02, -0.03, -0.02], [1, 0.8, 0.2, 0.004])
    assert outcomes[-1] == "losing"
    assert "losing" not in outcomes[:-1]
    assert verdict.changed
    assert verdict.loss.windows == 3
    assert verdict.loss.pass_at_1.total == pytest.approx(-0.07)
    assert verdict.reason.startswith("pass@1 -0.070 [")
    assert verdict.reason.endswith("over 3 windows since it was highest. p = 0.004 over the whole run.")


def test_losing_ends_after_cooldown_windows_in_a_row_that_speak_for_it():
    falling = ([-0.04, -0.04], [0.5, 0.001])
    flat, _, _ = judged([*falling[0], *[0.0] * 5], [*falling[1], *[0.5] * 5])
    assert flat[1:] == ["losing"] * 6, "what was lost is lost while it has not come back"
    back, state, verdict = judged([*falling[0], 0.05, 0.025, 0.0, 0.0], [*falling[1], *[0.5] * 4])
    assert back[1:5] == ["losing"] * 4, "two windows are not three"
    assert back[5] != "losing"
    assert (verdict.previous, verdict.changed) == ("losing", True)
    assert state.falling.windows == 0, "another loss begins anew"
    interrupted, _, _ = judged([*falling[0], 0.08, -0.05, 0.05, 0.0, 0.0], [*falling[1], *[0.5] * 5])
    assert interrupted[1:6] == ["losing"] * 5


def test_gaining_takes_the_interval_for_all_checks():
    outcomes, _, verdict = judged([0.010, 0.014, 0.014], [1, 1, 1])
    assert outcomes[0] == "holding", "a gain within the tolerance is none to report"
    assert judged([0.03], [1], se=0.012)[0] == ["undetermined"], "above 0 for this check alone is not enough"
    assert outcomes[-1] == "gaining"
    assert "above 0 by the interval for all checks" in verdict.reason


def test_holding_takes_an_interval_within_the_tolerance():
    outcomes, _, verdict = judged([0.001, -0.002], [1, 1])
    assert outcomes == ["holding", "holding"]
    assert "within 0.02 of 0" in verdict.reason
    wide, _, verdict = judged([0.001], [1], se=0.02)
    assert wide == ["undetermined"]
    assert "it takes about 5 times the prompts to tell a change of 0.02" in verdict.reason
    small_loss, _, _ = judged([-0.011], [0.3])
    assert small_loss == ["undetermined"], "an interval below 0 does not hold, however small the loss"
    between, _, verdict = judged([0.016], [1])
    assert between == ["undetermined"]
    assert "wait for more windows" in verdict.reason


def test_a_window_without_an_estimate_moves_nothing_but_is_told():
    outcomes, state, verdict = judged([None], [1])
    assert outcomes == ["undetermined"]
    outcomes, state, verdict = judged([-0.05, -0.05, None], [1, 0.001, 0.001])
    assert outcomes[-1] == "losing"
    assert not verdict.changed
    assert "no estimate" in verdict.reason
    assert state.recovered == 0
    _, _, verdict = judged([0.0, None, 0.0], [1, 1, 1])
    assert "since the start is +0.000 [-0.011, +0.011] (1 window missed)" in verdict.reason
    _, _, verdict = judged([-0.05, None, None, -0.05], [1, 1, 1, 0.001])
    assert "since it was highest (2 windows missed). p" in verdict.reason


def test_a_loss_beyond_the_largest_takes_the_sequence_and_is_new_once():
    rule = OutcomeRule(max_loss=0.05)
    assert not judged([-0.06], [0.001], rule)[2].exceeded
    _, state, verdict = judged([-0.06, -0.06], [0.1, 0.001], rule)
    assert verdict.exceeded
    assert verdict.newly
    assert not judged([-0.06, -0.06], [0.1, 0.001])[2].exceeded
    assert OutcomeState.restored(dataclasses.asdict(state)).exceeded, "a resumed run does not say it again"
    verdict = judged([-0.06, -0.06, -0.01], [0.1, 0.001, 0.5], rule)[2]
    assert (verdict.exceeded, verdict.newly) == (True, False)


def test_goes_on_from_a_checkpoint():
    changes, p_values = [-0.04, -0.04, 0.05, 0.025, 0.0, 0.0, -0.01], [0.5, 0.001, *[0.5] * 5]
    straight = judged(changes, p_values)
    _, state, _ = judged(changes[:4], p_values[:4])
    state = OutcomeState.restored(json.loads(json.dumps(dataclasses.asdict(state))))
    rest = judged(changes[4:], p_values[4:], state=state)
    assert rest[0][:1] == straight[0][4:5]
    assert rest[1] == straight[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cooldown": 0}, "whole number `cooldown` >= 1; found 0"),
        ({"confidence": 1.0}, "0 < `confidence` < 1; found 1.0"),
        ({"tolerance": 0.0}, "0 < `tolerance` < 1, a difference of two pass rates; found 0.0"),
        ({"max_loss": 5}, "0 < `max_loss` < 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(GuardError, match=message):
        OutcomeRule(**settings)


def test_a_p_value_is_one():
    with pytest.raises(GuardError, match=r"0 <= `p_value` <= 1; found 1\.5"):
        judged([0.0], [1.5])
