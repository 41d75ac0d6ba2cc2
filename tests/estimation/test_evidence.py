"""Evidence over a run: closed forms by integration, the error of a run by simulation, its part in the decision."""

import dataclasses
import math

import pytest
import torch

from passk_guard.estimation.evidence import HANDICAP, LARGEST_SCORE, RunEvidence, conflict_score, normal_score
from passk_guard.estimation.records import ConflictEstimate
from passk_guard.estimation.ustatistics import passk_rows, refresh_moments
from passk_guard.estimation.verdict import DecisionRule, DecisionState, decide
from passk_guard.utils.errors import GuardError
from tests.helpers.populations import draw, population


def evidence(scores, before=0):
    found = RunEvidence((), before)
    for score in scores:
        found = found.with_score(score)
    return found


def student_tail(t, degrees):
    """P(T > t) by the trapezoidal rule over u = (x - t)/(1 + x - t)."""
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)[:-1]
    x = t + u / (1 - u)
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    return float(torch.trapezoid(constant * (1 + x * x / degrees) ** (-(degrees + 1) / 2) / (1 - u) ** 2, u))


@pytest.mark.parametrize(("degrees", "tolerance"), [(2, 0.06), (3, 0.05), (10, 0.02), (63, 0.002)])
@pytest.mark.parametrize("t", [0.5, 1.5, 3.0, 6.0, -2.0])
def test_a_normal_score_has_the_same_p_value(t, degrees, tolerance):
    tail = torch.tensor(student_tail(abs(t), degrees), dtype=torch.float64)
    exact = math.copysign(-float(torch.special.ndtri(tail)), t)
    assert normal_score(t, degrees) == pytest.approx(exact, abs=tolerance)


@pytest.mark.parametrize("before", [0, 4])
@pytest.mark.parametrize("scores", [[2.5], [1.0, 2.0, -0.5], [-1.0] * 5, [0.3] * 8])
def test_the_p_value_is_the_mixture_over_strengths_and_beginnings(scores, before):
    strength = torch.linspace(0, 40, 400_001, dtype=torch.float64)
    prior = math.sqrt(2 / math.pi) * torch.exp(-strength.square() / 2)
    total = 0.0
    for j in range(len(scores)):
        count, size = len(scores) - j, sum(scores[j:])
        began = before + j + 1
        product = torch.exp(strength * size - count * strength.square() / 2)
        total += float(torch.trapezoid(prior * product, strength)) / (began * (began + 1))
    assert evidence(scores, before).p_value == pytest.approx(min(1.0, 1 / total), rel=1e-4)


def test_no_false_alarm_in_a_whole_run_but_for_one_in_twenty():
    """400 runs of 80 looks without a conflict; each look by itself would alarm in nearly all of them."""
    scores = torch.randn(400, 80, generator=torch.Generator().manual_seed(0))
    alarms = alone = 0
    for run in scores.tolist():
        found, lowest = RunEvidence(), 1.0
        for score in run:
            found = found.with_score(score)
            lowest = min(lowest, found.p_value)
        alarms += lowest <= 0.05
        alone += max(run) > 1.645
    assert alarms / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert alone / 400 > 0.9


@pytest.mark.parametrize(("clear_looks", "at_most"), [(0, 5), (20, 12)])
def test_a_conflict_is_found_whenever_it_begins(clear_looks, at_most):
    found = evidence([-0.5, 0.5] * (clear_looks // 2))
    assert found.p_value > 0.05
    looks = 0
    while found.p_value > 0.05:
        found, looks = found.with_score(2.0), looks + 1
    assert looks <= at_most


def test_one_look_alone_never_alarms_and_scores_are_cut():
    assert evidence([50.0]) == evidence([LARGEST_SCORE])
    assert evidence([50.0]).p_value > 0.05
    assert evidence([]).p_value == 1.0
    assert evidence([1.0, None, 2.0]) == evidence([1.0, 2.0])


def test_a_restart_spends_what_was_looked_at():
    again = evidence([3.0] * 5).restarted()
    assert again == RunEvidence((), 5)
    assert again.p_value == 1.0
    assert again.with_score(2.0).p_value >= evidence([2.0]).p_value


def test_long_runs_neither_overflow_nor_underflow():
    assert 0 <= evidence([3.0] * 500).p_value < 1e-300
    assert evidence([-3.0] * 500).p_value == 1.0


def test_the_score_of_a_refresh():
    probe = draw(population(-0.6), 64, 16, torch.Generator().manual_seed(3))
    moments = refresh_moments(probe, passk_rows(torch.tensor([8])))
    t = float(moments.value[0, 0]) / float(moments.covariance[0, 0, 0]) ** 0.5
    score = conflict_score(probe, 8)
    assert score == pytest.approx(-normal_score(t, float(moments.degrees[0])) - HANDICAP)
    assert score > 0
    larger = dataclasses.replace(probe, gram=probe.gram * 1e8)
    assert conflict_score(larger, 8) == pytest.approx(score)
    assert conflict_score(probe, 8, threshold=-0.5) < score < conflict_score(probe, 8, threshold=0.5)


def test_no_score_without_a_statistic():
    probe = draw(population(-0.6), 16, 16, torch.Generator().manual_seed(4))
    solved = dataclasses.replace(probe, num_correct=probe.num_samples)
    assert conflict_score(solved, 8) is None
    silent = dataclasses.replace(probe, gram=torch.zeros_like(probe.gram))
    assert conflict_score(silent, 8) is None
    assert conflict_score(silent, 8, threshold=0.1) is None


def estimate(status, cosine):
    counts = {"num_prompts": 64, "num_informative": 50, "num_refreshes": 1}
    return ConflictEstimate(8, status, "", 0.95, 0.0, cosine=cosine, **counts)


def verdicts(looks, rule):
    state, found, out = DecisionState(), RunEvidence(), []
    for status, cosine, score in looks:
        state, found, verdict = decide(state, found, estimate(status, cosine), score, rule)
        out.append(verdict.status)
    return out, state, found


WHOLE_RUN = DecisionRule(patience=2, cooldown=3, false_alarms=0.05)


def test_a_conflict_takes_the_evidence_of_the_run():
    looks = [("conflict", -0.5, 1.7)] * 6
    found, _, _ = verdicts(looks, WHOLE_RUN)
    first = found.index("conflict")
    assert first == next(i for i in range(6) if evidence([1.7] * (i + 1)).p_value <= 0.05)
    assert first > 1, "two looks that are established one by one are not the run's evidence"
    assert set(found[first:]) == {"conflict"}
    one_by_one, _, _ = verdicts(looks, DecisionRule(patience=2, cooldown=3))
    assert one_by_one.index("conflict") == 1


def test_a_conflict_stands_while_the_estimate_is_below_and_ends_after_the_cooldown():
    start = [("conflict", -0.8, 3.0)] * 3
    weak = [("undetermined", -0.2, 0.4)] * 6
    over = [("undetermined", 0.1, -0.5), ("clear", 0.4, -2.0), ("clear", 0.4, -2.0)]
    found, state, left = verdicts(start + weak + over, WHOLE_RUN)
    assert found[2:11] == ["conflict"] * 9
    assert found[11] == "clear"
    assert state == DecisionState(verdict="clear")
    assert left == RunEvidence((), 12)


def test_clear_needs_patience_as_before():
    found, _, _ = verdicts([("clear", 0.5, -2.0)] * 2, WHOLE_RUN)
    assert found == ["undetermined", "clear"]


def test_resuming_in_the_middle_changes_nothing():
    generator = torch.Generator().manual_seed(5)
    scores = (torch.randn(30, generator=generator) + 0.8).tolist()
    looks = [("conflict" if s > 1.7 else "undetermined", -0.1 if s > 0 else 0.1, s) for s in scores]
    whole, state, found = verdicts(looks, WHOLE_RUN)
    assert len(set(whole)) > 1
    _, state1, found1 = verdicts(looks[:11], WHOLE_RUN)
    state1 = DecisionState(**dataclasses.asdict(state1))
    found1 = RunEvidence(**{k: tuple(v) if k == "scores" else v for k, v in dataclasses.asdict(found1).items()})
    for status, cosine, score in looks[11:]:
        state1, found1, _ = decide(state1, found1, estimate(status, cosine), score, WHOLE_RUN)
    assert (state1, found1) == (state, found)


def test_misuse():
    with pytest.raises(GuardError, match="false_alarms"):
        DecisionRule(false_alarms=1.5)
