"""Evidence over a run: closed forms by integration, the error of a run by simulation, its part in the decision."""

import dataclasses
import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch

from benchmarks.calibration_populations import Synthetic, ThreeKinds, with_cosine
from benchmarks.calibration_runs import first_alarms
from benchmarks.calibration_statistics import checks_of, guard
from passk_guard import run_p_value
from passk_guard.estimation.evidence import DOUBT, LARGEST, Check, RunEvidence, conflict_check, log_evidence
from passk_guard.estimation.records import ConflictEstimate
from passk_guard.estimation.ustatistics import passk_rows, refresh_moments
from passk_guard.estimation.verdict import DecisionRule, DecisionState, decide
from passk_guard.utils.errors import GuardError
from tests.helpers.populations import draw, population


def evidence(checks, before=0):
    found = RunEvidence((), before)
    for check in checks:
        found = found.with_check(check)
    return found


def plain(values, variance=1.0, count=50.0):
    return [Check(value, variance, count) for value in values]


def by_hand(checks, before):
    """The formulas of the module in loops, its integral by the trapezoidal rule."""
    usual = [checks[0].variance]
    for i in range(1, len(checks)):
        recent = [check.variance for check in checks[max(0, i - 8) : i]]
        usual.append(sum(recent) / len(recent))
    x = [check.value / math.sqrt(u) for check, u in zip(checks, usual, strict=True)]
    v = [check.variance / u for check, u in zip(checks, usual, strict=True)]
    t = len(checks)
    mean = sum(v) / t
    doubt = sum((a - mean) ** 2 + 2 * a * a / check.count for a, check in zip(v, checks, strict=True))
    pooled = mean + DOUBT * math.sqrt(doubt) / t
    if t >= 4:
        pooled = max(pooled, sum((b - a) ** 2 for a, b in pairwise(x)) / (t - 1) / 2)
    x = [min(a, LARGEST * math.sqrt(max(b, pooled))) for a, b in zip(x, v, strict=True)]
    strength = torch.linspace(0, 40, 400_001, dtype=torch.float64)
    prior = math.sqrt(2 / math.pi) * torch.exp(-strength.square() / 2)
    total = 0.0
    for j in range(t):
        spread, began = max(sum(v[j:]), (t - j) * pooled), before + j + 1
        product = torch.exp(strength * sum(x[j:]) - spread * strength.square() / 2)
        total += float(torch.trapezoid(prior * product, strength)) / (began * (began + 1))
    return min(1.0, 1 / total)


@pytest.mark.parametrize("before", [0, 4])
@pytest.mark.parametrize(
    "checks",
    [
        plain([2.5]),
        plain([9.0]),
        plain([1.0, 2.0, -0.5]),
        plain([-1.0] * 5),
        plain([0.3, 2.9, -1.0, 0.4] * 3),
        [Check(2.0 * (i + 1), (i + 1.0) ** 2, 3.0 + i) for i in range(12)],
    ],
)
def test_the_p_value_is_the_mixture_over_strengths_and_beginnings(checks, before):
    assert evidence(checks, before).p_value == pytest.approx(by_hand(checks, before), rel=1e-4)


def test_no_false_alarm_in_a_whole_run_but_for_one_in_twenty():
    """1,000 runs of 80 checks without a conflict; each check by itself would alarm in nearly all of them."""
    values = torch.randn(1000, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(values)
    assert float(first_alarms(values, ones, 20 * ones).isfinite().double().mean()) <= 0.05
    assert float((values > 1.645).any(1).double().mean()) > 0.9


@cache
def drawn(make, cosine, spread=0.3, cluster=1):
    """[3, N] values, variances and counts of 1,500 checks of 64 prompts, and the means of the values set right."""
    generator, rows = torch.Generator().manual_seed(6), []
    for _ in range(6):
        moments = guard(with_cosine(cosine, 8, make, spread=spread, cluster=cluster).draw(250, 64, 16, generator), 8)
        rows += [(check.value, check.variance, check.count) for check in checks_of(moments)]
    values, variances, counts = torch.tensor(rows, dtype=torch.float64).T
    if cosine == 0 and cluster == 1:
        values = values - values.mean()
    return torch.stack([values, variances, counts])


def runs_of(checks, runs, length):
    picked = torch.randint(checks.shape[1], (runs, length), generator=torch.Generator().manual_seed(7))
    return checks[:, picked]


@pytest.mark.parametrize(("spread", "cluster"), [(0.02, 1), (0.1, 1), (0.1, 4)])
def test_no_false_alarms_where_most_samples_miss_the_prompts_that_agree(spread, cluster):
    """Values over their own standard errors have a mean of up to +0.5 here, and their sum calls a third of the runs."""
    values, variances, counts = runs_of(drawn(ThreeKinds, 0.0, spread, cluster), 800, 60)
    assert float(first_alarms(values, variances, counts).isfinite().double().mean()) <= 0.05
    if cluster == 1:
        ones = torch.ones_like(values)
        assert float((values / variances.sqrt()).mean()) > 0.3
        studentised = first_alarms(values / variances.sqrt() - 0.1, ones, 1e9 * ones)
        assert float(studentised.isfinite().double().mean()) > 0.1


@pytest.mark.parametrize(("cosine", "median", "most"), [(-0.2, 12, 24), (-0.4, 6, 10), (-0.73, 4, 6)])
def test_how_soon_a_conflict_is_called(cosine, median, most):
    first = first_alarms(*runs_of(drawn(Synthetic, cosine), 400, 40))
    assert float(first.quantile(0.5)) <= median
    assert float(first.quantile(0.9)) <= most


@pytest.mark.parametrize("shrinks", [1.0, 30.0, 1 / 30])
def test_a_conflict_is_found_late_in_a_run_whose_gradients_grow_or_shrink(shrinks):
    """By a factor of 30 in the standard error over 40 checks; the conflict begins at the 20th."""
    quiet, conflict = (runs_of(drawn(Synthetic, c), 200, 60) for c in (0.0, -0.4))
    values, variances, counts = torch.cat([quiet[..., :20], conflict[..., 20:]], -1)
    scale = shrinks ** -(torch.arange(60, dtype=torch.float64).clamp(max=40) / 40)
    first = first_alarms(values * scale, variances * scale**2, counts)
    assert float((first <= 20).double().mean()) <= 0.05
    assert float((first <= 40).double().mean()) >= 0.9


@pytest.mark.parametrize("scale", [1e-50, 1e50])
def test_the_unit_of_the_values_does_not_matter(scale):
    checks = [Check(1.0 + i, 2.0 + i, 9.0) for i in range(6)]
    scaled = [Check(c.value * scale, c.variance * scale**2, c.count) for c in checks]
    assert evidence(scaled).p_value == pytest.approx(evidence(checks).p_value)


@pytest.mark.parametrize(("clear_checks", "at_most"), [(0, 5), (20, 13)])
def test_a_conflict_is_found_whenever_it_begins(clear_checks, at_most):
    found = evidence(plain([-0.5, 0.5] * (clear_checks // 2)))
    assert found.p_value > 0.05
    checks = 0
    while found.p_value > 0.05:
        found, checks = found.with_check(*plain([2.0])), checks + 1
    assert checks <= at_most


@pytest.mark.parametrize("count", [1.0, 10.0, 1e9])
def test_one_check_alone_never_alarms(count):
    assert evidence(plain([1e6], count=count)).p_value > 0.05


def test_what_says_nothing_changes_nothing():
    assert RunEvidence().p_value == 1.0
    assert evidence([None, Check(3.0, 0.0, 5.0)]) == RunEvidence()


def test_a_restart_spends_what_was_checked():
    again = evidence(plain([3.0] * 5)).restarted()
    assert again == RunEvidence((), 5)
    assert again.p_value == 1.0
    assert again.with_check(*plain([2.0])).p_value >= evidence(plain([2.0])).p_value


def test_long_runs_neither_overflow_nor_underflow():
    assert 0 <= evidence(plain([3.0] * 500)).p_value < 1e-200
    assert evidence(plain([-3.0] * 500)).p_value == 1.0


def test_the_check_of_a_refresh():
    probe = draw(population(-0.6), 64, 16, torch.Generator().manual_seed(3))
    moments = refresh_moments(probe, passk_rows(torch.tensor([8])))
    check = conflict_check(probe, 8)
    assert check == Check(-float(moments.value[0, 0]), check.variance, float(moments.degrees[0]))
    assert check.variance == pytest.approx(float(moments.covariance[0, 0, 0]))
    assert check.value > 0
    larger = conflict_check(dataclasses.replace(probe, gram=probe.gram * 1e8), 8)
    assert larger.value / math.sqrt(larger.variance) == pytest.approx(check.value / math.sqrt(check.variance))
    lower, higher = (conflict_check(probe, 8, threshold=threshold) for threshold in (-0.5, 0.5))
    assert lower.value < check.value < higher.value


def test_no_check_without_a_statistic():
    probe = draw(population(-0.6), 16, 16, torch.Generator().manual_seed(4))
    solved = dataclasses.replace(probe, num_correct=probe.num_samples)
    assert conflict_check(solved, 8) is None
    silent = dataclasses.replace(probe, gram=torch.zeros_like(probe.gram))
    assert conflict_check(silent, 8) is None
    assert conflict_check(silent, 8, threshold=0.1) is None


def test_the_running_p_value_of_refreshes():
    generator = torch.Generator().manual_seed(8)
    probes = [draw(population(-0.8), 64, 16, generator) for _ in range(5)]
    found = run_p_value(probes, 8)
    checks = [conflict_check(probe, 8) for probe in probes]
    assert found == [evidence(checks[: i + 1]).p_value for i in range(5)]
    assert found[-1] <= 0.05
    assert run_p_value([], 8) == []
    assert run_p_value(probes, 8, threshold=-0.9)[-1] > found[-1]
    seen = dataclasses.replace(probes[0], misses=torch.ones(64, 16, dtype=torch.float64))
    assert run_p_value([seen, *probes], 8) == [1.0, *found]


@pytest.mark.parametrize("change", [{"k": 17}, {"threshold": 1.0}, {"threshold": math.nan}, {"threshold": "low"}])
def test_misuse_of_the_running_p_value(change):
    probe = draw(population(-0.6), 8, 16, torch.Generator().manual_seed(4))
    with pytest.raises(GuardError, match="Expected"):
        run_p_value([probe], **({"k": 8} | change))
    with pytest.raises(GuardError, match="ProbeGram"):
        run_p_value(probe, 8)


@pytest.mark.parametrize(
    "wrong", [(math.nan, 1, 5), (1, -1, 5), (1, math.inf, 5), (1, 1, 0), ("1", 1, 5), (1, 1, None)]
)
def test_a_check_that_is_none(wrong):
    with pytest.raises(GuardError, match="Expected"):
        Check(*wrong)


def estimate(status, cosine):
    counts = {"num_prompts": 64, "num_informative": 50, "num_refreshes": 1}
    return ConflictEstimate(8, status, "", 0.95, 0.0, cosine=cosine, **counts)


def verdicts(looks, rule):
    state, found, out = DecisionState(), RunEvidence(), []
    for status, cosine, value in looks:
        state, found, verdict = decide(state, found, estimate(status, cosine), *plain([value]), rule)
        out.append(verdict.status)
    return out, state, found


WHOLE_RUN = DecisionRule(patience=2, cooldown=3, false_alarms=0.05)


def test_a_conflict_takes_the_evidence_of_the_run():
    looks = [("conflict", -0.5, 1.7)] * 8
    found, _, _ = verdicts(looks, WHOLE_RUN)
    first = found.index("conflict")
    assert first == next(i for i in range(8) if evidence(plain([1.7] * (i + 1))).p_value <= 0.05)
    assert first > 1, "two checks that are established one by one are not the run's evidence"
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


@pytest.mark.parametrize(("inner", "stands"), [(-0.1, True), (0.1, False), (None, False)])
def test_a_conflict_without_a_number_stands_while_the_inner_product_is_below(inner, stands):
    state, found, rule = DecisionState("conflict"), RunEvidence(), WHOLE_RUN
    for _ in range(rule.cooldown):
        silent = replace(estimate("undetermined", None), inner_product=inner, norm1_sq=1.0, normk_sq=-1.0)
        state, found, verdict = decide(state, found, silent, None, rule)
    assert (verdict.status == "conflict") == stands


def test_clear_needs_patience_as_before():
    found, _, _ = verdicts([("clear", 0.5, -2.0)] * 2, WHOLE_RUN)
    assert found == ["undetermined", "clear"]


def test_resuming_in_the_middle_changes_nothing():
    generator = torch.Generator().manual_seed(5)
    values = (torch.randn(30, generator=generator) + 0.8).tolist()
    looks = [("conflict" if x > 1.7 else "undetermined", -0.1 if x > 0 else 0.1, x) for x in values]
    whole, state, found = verdicts(looks, WHOLE_RUN)
    assert len(set(whole)) > 1
    _, state1, found1 = verdicts(looks[:11], WHOLE_RUN)
    state1 = DecisionState(**dataclasses.asdict(state1))
    saved = dataclasses.asdict(found1)
    found1 = RunEvidence(tuple(Check(**check) for check in saved["checks"]), saved["before"])
    for status, cosine, value in looks[11:]:
        state1, found1, _ = decide(state1, found1, estimate(status, cosine), *plain([value]), WHOLE_RUN)
    assert (state1, found1) == (state, found)


def test_the_evidence_of_many_runs_is_that_of_each():
    rows = torch.rand(3, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + torch.tensor(
        [-0.2, 0.5, 3.0]
    ).double().view(3, 1, 1)
    for before in (0, 3):
        together = log_evidence(*rows, before).tolist()
        for row, found in zip(rows.unbind(1), together, strict=True):
            checks = [Check(*column) for column in row.T.tolist()]
            assert evidence(checks, before).p_value == pytest.approx(math.exp(-max(0.0, found)))


def test_misuse():
    with pytest.raises(GuardError, match="false_alarms"):
        DecisionRule(false_alarms=1.5)
