"""The rules of the head-to-head and what is said of them, from records whose figures are known by hand."""

import pytest

from benchmarks import alarms
from benchmarks.alarms import Alarm, figures, judge, runs_of

EXACT = [0.60, 0.62, 0.52, 0.42, 0.47]


def run(exact=EXACT, **columns):
    """Checks every 5 steps with these columns, a value a check."""
    rows = [{"step": 5 * i, "exact": rate} for i, rate in enumerate(exact)]
    return [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)]


def at(step):
    return lambda checks: step


@pytest.mark.parametrize(
    ("step", "to_come"),
    [
        (0, 1.0),  # before the fall from 0.62 to 0.42
        (5, 1.0),
        (10, 0.5),
        (15, 0.0),
        (20, 0.0),  # after the lowest
    ],
)
def test_what_is_still_to_come(step, to_come):
    assert judge(at(step), run()) == Alarm(step, False, True, pytest.approx(to_come))


def test_an_alarm_is_false_where_nothing_fell_and_nothing_will():
    rising = run([0.60, 0.61, 0.605, 0.65, 0.70])
    assert judge(at(10), rising) == Alarm(10, True, False, None)
    assert judge(at(None), rising) == Alarm(None, False, False, None)
    late = run([0.50, 0.70, 0.70, 0.60, 0.65])
    assert judge(at(0), late) == Alarm(0, False, True, 1.0), "a forecast that comes true"
    recovered = run([0.60, 0.55, 0.70, 0.70, 0.70])
    assert not judge(at(5), recovered).false
    assert judge(at(15), recovered) == Alarm(15, True, True, 0.0)
    assert judge(at(15), run([0.60, 0.60, 0.60, 0.60, 0.597])).false, "less than the smallest fall"


def test_figures_of_a_rule_over_runs():
    rising = run([0.60, 0.61, 0.62, 0.65, 0.70])
    steps = iter([10, 15, None, 5])
    found = figures(lambda checks: next(steps), [run(), run(), run(), rising])
    assert found == {
        "runs": 4,
        "fell": 3,
        "alarms": 3,
        "false": 1,
        "missed": 1,
        "step": 12.5,
        "to_come": pytest.approx(0.25),
    }
    silent = figures(at(None), [run()])
    assert (silent["missed"], silent["step"], silent["to_come"]) == (1, None, None)


def test_each_rule_goes_at_its_first_check_beyond_the_threshold():
    checks = run(
        losing_p=[1.0, 0.2, 0.05, 0.01, 0.3],
        conflict_p=[0.04, 0.2, 0.3, 0.01, 0.3],
        total=[0.0, -0.01, -0.02, -0.04, -0.05],
        variance=[0.0, 1e-4, 1e-4, 1e-4, 1e-4],
        entropy=[1.0, 0.81, 0.80, 0.79, 0.5],
        kl=[0.0, 0.05, 0.1, 0.11, 0.2],
        new_pass_at_1=[0.6, 0.5, 0.7, 0.5, 0.5],
        new_pass_at_k=[0.8, 0.7, 0.9, 0.8, 0.81],
        same_pass_at_1=[0.6, 0.5, 0.6, 0.6, 0.6],
        same_pass_at_k=[0.8, 0.9, 0.9, 0.9, 0.9],
        right=[[8, 8, 8], [8, 8, 8], [7, 9, 7], [7, 6, 7], [7, 7, 7]],
    )
    found = {name: rule(checks) for name, rule in alarms.RULES.items()}
    assert found == {
        "LOSING": 10,
        "CONFLICT": 0,
        "total below 0 by its sequence": 20,  # 5 standard errors; a single look asks for 2, all looks for more than 4
        "pass@8 up, pass@1 down; new prompts": 20,
        "pass@8 up, pass@1 down; same prompts": 5,
        "paired test of pass@1; same prompts": 15,  # -4/3 +- 1/3 of 16: t = -4, beyond -2.92
        "entropy 20% lower": 15,
        "KL above 0.1 a token": 15,
    }
    assert alarms.losing(checks, alpha=0.02) == 15
    assert alarms.far_away(checks, nats=1.0) is None


def test_runs_are_told_apart_and_in_order():
    records = [{"setting": "mild", "seed": seed, "step": step} for seed in (1, 0) for step in (5, 0)]
    found = runs_of([*records, {"setting": "none", "seed": 0, "step": 0}], "mild")
    assert {seed: [check["step"] for check in checks] for seed, checks in found.items()} == {0: [0, 5], 1: [0, 5]}


def test_the_picture_is_drawn_from_records(tmp_path):
    names = ("new_pass_at_1", "new_pass_at_k", "same_pass_at_1", "same_pass_at_k", "entropy", "kl")
    checks = run(
        losing_p=[1.0, 1.0, 0.01, 0.01, 0.01],
        conflict_p=[1.0] * 5,
        total=[0.0] * 5,
        variance=[0.0] * 5,
        right=[[8, 8, 8]] * 5,
        **{name: [0.5] * 5 for name in names},
    )
    alarms.draw(tmp_path / "alarms.png", [{"setting": "conflict", "seed": 0} | check for check in checks])
    assert (tmp_path / "alarms.png").stat().st_size > 5000
