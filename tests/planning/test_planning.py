"""`passk-guard plan` and the line in the log: what a user reads, from what a run wrote."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch

from passk_guard import Advanced, GuardConfig, ProbeGram
from passk_guard.analysis import Analysis
from passk_guard.analysis.store import JSON_NAME
from passk_guard.callback.state import Memory
from passk_guard.cli import main
from passk_guard.estimation.power import Noise, average_noise, look_of, looks_until_called, measure_noise
from passk_guard.planning import Cost, decision_rule, make_plan, outlook
from passk_guard.planning.inputs import past_of, read_noise
from passk_guard.planning.summary import describe_plan, plan_line
from passk_guard.reporting import Journal
from passk_guard.reporting.journal import read_journal
from passk_guard.reporting.reporter import Pace
from passk_guard.utils.errors import GuardError
from tests.analysis.cases import synthetic
from tests.callback.test_guard import FixedSampler, conflicted, guard_of
from tests.helpers.populations import draw, population
from tests.helpers.tiny import tiny_lm_trainer


def probes(count, cosine=-0.1, m=64, noise=0.1):
    generator = torch.Generator().manual_seed(0)
    return [draw(population(cosine, noise=noise), m, 16, generator) for _ in range(count)]


@pytest.fixture
def run_dir(tmp_path):
    """A run of six refreshes; the first one is slow, as first ones are."""

    def write(found, settings=None):
        journal = Journal(tmp_path / "run" / "passk_guard.jsonl")
        journal.write("start", 0, settings={"k": 8, "num_samples": 16, "refresh_steps": 5} | (settings or {}))
        for i, probe in enumerate(found):
            seconds = {"probe_seconds": 9.0 if i == 0 else 2.0, "step_seconds": None if i == 0 else 0.5}
            journal.write("refresh", 5 * i, noise=measure_noise(probe, 8).to_dict(), **seconds)
        return tmp_path / "run"

    return write


def call(capsys, *arguments):
    status = main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_table(run_dir, capsys):
    status, out, err = call(capsys, run_dir(probes(6)))
    assert (status, err) == (0, "")
    assert "6 refreshes, steps 0 to 25: cos(pass@1, pass@8) on 64 prompts x 16 samples every 5 steps" in out
    assert "A cosine of -0.20 from the start of a run on is called CONFLICT with 90% power" in out
    rows = [line for line in out.splitlines() if line[2:].strip()[:1].isdigit()]
    assert len(rows) == 5
    own = next(row for row in rows if row.startswith(">"))
    assert own.split()[1] == "64"
    assert own.split()[-2:] == ["0.4", "80%"], "2 s every 5 steps of 0.5 s"
    assert "One estimate alone has that power with" in out
    assert max(map(len, out.splitlines())) <= 200


def test_the_same_for_a_program(run_dir, capsys):
    folder = run_dir(probes(6))
    status, out, _ = call(capsys, folder, "--json", "--power", 0.8, "--cosine", -0.4, "--prompts", 100)
    found = json.loads(out)
    assert status == 0
    assert (found["power"], found["cosine"]) == (0.8, -0.4)
    assert [option["prompts"] for option in found["options"]] == [64, 100]
    for option in found["options"]:
        assert option["fewest"] <= option["refreshes"] <= option["most"]
        assert option["steps"] == 5 * option["refreshes"]
        assert option["seconds"] == pytest.approx(2.0 * option["prompts"] / 64 / 5)
    assert found["cost"] == {"probe_seconds": 2.0, "step_seconds": 0.5, "refresh_steps": 5.0}
    assert call(capsys, folder, "--json", "--power", 0.8, "--cosine", -0.4, "--prompts", 100)[1] == out


def test_a_smaller_conflict_or_more_power_takes_longer():
    noise, config = average_noise([measure_noise(p, 8) for p in probes(6)]), GuardConfig()

    def looks(**what):
        return make_plan(noise, config, prompts=(64,), **what).options[0].refreshes

    assert looks(cosine=-0.5) < looks(cosine=-0.3) < looks(cosine=-0.2)
    assert looks(power=0.5) < looks(power=0.9) < looks(power=0.99)


def test_the_rule_of_the_run_decides():
    noise = average_noise([measure_noise(p, 8) for p in probes(6)])
    each = make_plan(noise, GuardConfig(advanced=Advanced(alert_rule="each_look")), cosine=-0.4, prompts=(64,)).options[
        0
    ]
    strict = make_plan(
        noise, GuardConfig(advanced=Advanced(alert_rule="each_look"), patience=6), cosine=-0.4, prompts=(64,)
    ).options[0]
    whole = make_plan(noise, GuardConfig(), cosine=-0.4, prompts=(64,)).options[0]
    surer = make_plan(noise, GuardConfig(confidence=0.99), cosine=-0.4, prompts=(64,)).options[0]
    assert each.refreshes < strict.refreshes
    assert each.refreshes < whole.refreshes < surer.refreshes


def test_under_a_budget_more_prompts_mean_fewer_refreshes(run_dir, capsys):
    folder = run_dir(probes(6), {"refresh_steps": None})
    found = json.loads(call(capsys, folder, "--json", "--cosine", -0.4, "--prompts", 128)[1])
    for option in found["options"]:
        assert option["steps"] == math.ceil(5 * option["prompts"] / 64 * option["refreshes"])
        assert option["share"] == pytest.approx(2.0 / 5 / 0.5), "the share stays as it is"
    assert "every 5 steps (overhead 0.1)" in call(capsys, folder, "--cosine", -0.4)[1]


def test_only_refreshes_that_sample_count(run_dir, capsys):
    seen_before = replace(probes(1)[0], misses=torch.ones(64, 16, dtype=torch.float64))
    assert measure_noise(seen_before, 8) is None
    noise = average_noise([measure_noise(p, 8) for p in probes(6)])
    every, third = (make_plan(noise, GuardConfig(resample_refreshes=r, refresh_steps=5)).options for r in (1, 3))
    assert [3 * option.steps for option in every] == [option.steps for option in third]
    page = call(capsys, run_dir(probes(6), {"resample_refreshes": 3}))[1]
    assert "refreshes that sample count, one in 3" in page


@pytest.mark.parametrize("serves", [1, 2, 3, 5])
@pytest.mark.parametrize("pool", [1, 2, 3, 4, 7])
def test_one_estimate_pools_as_many_draws_as_the_run_will(serves, pool):
    fresh = probes(1)[0]
    again = replace(fresh, misses=torch.ones(64, 16, dtype=torch.float64))
    memory, config = Memory(), GuardConfig(resample_refreshes=serves, pool_refreshes=pool)
    for step in range(8 * serves + 1):  # the last one samples
        memory = memory.with_refresh(again if step % serves else fresh, pool, step)
    plan = make_plan(average_noise([measure_noise(p, 8) for p in probes(6)]), config)
    assert list(plan.single) == sorted({1, len(memory.pooled(pool))})


def test_without_a_signal_there_is_no_number(run_dir, capsys):
    folder = run_dir(probes(2, m=16, noise=1.0))
    status, out, _ = call(capsys, folder)
    assert status == 0
    assert "No power can be stated: |grad J_" in out
    assert "is not established over 2 refreshes" in out
    found = json.loads(call(capsys, folder, "--json")[1])
    assert found["signal"]["size"] is None
    assert all(option["refreshes"] is None and option["steps"] is None for option in found["options"])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_signal_that_is_not_established_gives_a_figure_beside_the_least(sign):
    """The oracle: looks until called at the signal as measured. A norm that is negative gives the least alone."""
    noise, config = average_noise([measure_noise(p, 8) for p in probes(2)]), GuardConfig(refresh_steps=5)
    half = torch.tensor([0.0, 1.5 * sign * noise.error(1), 1.5 * noise.error(2)], dtype=torch.float64)
    noise = replace(noise, value=half)
    plan = make_plan(noise, config, cosine=-0.8, prompts=(128, 512))
    rows = [line[1:].split() for line in describe_plan(plan, "here") if line[2:].strip()[:1].isdigit()]
    for option, row in zip(plan.options, rows, strict=True):
        assert option.refreshes is option.most is None
        seen = None
        if sign > 0:
            look = look_of(noise, math.sqrt(half[1] * half[2]), -0.8, option.prompts)
            seen = looks_until_called(look, decision_rule(config), 0.9)
            assert seen >= option.fewest
        assert option.as_measured == seen
        assert row[:4] == [str(option.prompts), str(seen or "-"), str(option.fewest), "or"]
    words = f"in {plan.own.as_measured} refreshes, at the very least in {plan.own.fewest}"
    assert (words in plan_line(plan)) == (sign > 0)
    assert sign < 0 or plan.own.as_measured > plan.own.fewest


def test_prompts_that_are_always_solved_are_named():
    found = probes(3, m=16, noise=1.0)
    correct = torch.where(torch.arange(16) < 12, 16, found[0].num_correct)
    quiet = [ProbeGram(p.gram, p.num_samples, correct) for p in found]
    line = outlook(quiet, GuardConfig(), Cost(1.0))
    assert "no power can be stated" in line
    assert "always solved" in line
    assert "choose prompts the model solves sometimes" in line


def test_the_newest_refreshes_alone(run_dir, capsys):
    folder = run_dir([*probes(3, noise=1.0), *probes(3)])
    past = past_of(read_journal(folder), 3)
    assert (past.where, past.noise.refreshes) == (f"{folder}, 3 refreshes, steps 15 to 25", 3)
    assert "steps 15 to 25" in call(capsys, folder, "--last", 3)[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cosine", "0.2"], "cosine=0.2, threshold=0"),
        (["--cosine", "-1.5"], "-1 <= `cosine`"),
        (["--cosine", "nan"], "cosine=nan"),
        (["--power", "1"], "0 < `power`"),
        (["--power", "0"], "0 < `power`"),
        (["--prompts", "2"], "`prompts` >= 4"),
        (["--last", "0"], "at least 1 refresh"),
    ],
)
def test_numbers_outside_their_range(arguments, words, run_dir, capsys):
    status, out, err = call(capsys, run_dir(probes(3)), *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("passk-guard: error: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"cosine": -0.3}, "Run the guard again for `pool_refreshes` refreshes"),
        ({"noise": None}, "Choose prompts the model solves sometimes"),
        ({"noise": {"value": 3}}, "as a run writes it"),
        (None, "found none yet"),
    ],
)
def test_a_journal_that_holds_nothing_to_plan_from(event, words, tmp_path, capsys):
    journal = Journal(tmp_path / "passk_guard.jsonl")
    journal.write("failed_refresh", 0, reason="x", streak=1)
    if event is not None:
        journal.write("refresh", 5, **event)
    status, out, err = call(capsys, tmp_path)
    assert (status, out) == (1, "")
    assert words in err
    assert err.count("\n") == 1


def test_noise_comes_back_from_json():
    noise = measure_noise(probes(1)[0], 8)
    again = read_noise(json.loads(json.dumps(noise.to_dict())))
    assert isinstance(again, Noise)
    for name, value in vars(noise).items():
        assert torch.equal(torch.as_tensor(getattr(again, name)), torch.as_tensor(value)), name


@pytest.mark.parametrize(
    "change",
    [
        {"value": [1.0, 2.0]},
        {"value": [1.0, None, 2.0]},
        {"linear": "much"},
        {"degrees": None},
        {"degrees": math.nan},
        {"prompts": 2},
        {"solved": 0.9, "failed": 0.9},
        {"value": [math.inf, 1.0, 1.0]},
    ],
)
def test_noise_that_no_run_writes(change):
    with pytest.raises(GuardError, match="noise of a refresh"):
        read_noise(measure_noise(probes(1)[0], 8).to_dict() | change)


def test_settings_that_no_run_has(run_dir, capsys):
    status, _, err = call(capsys, run_dir(probes(3), {"k": 99}))
    assert status == 1
    assert "Settings in" in err


def test_settings_of_another_version(run_dir):
    assert past_of(read_journal(run_dir(probes(3), {"novelty": 1}))).config == GuardConfig(refresh_steps=5)
    earlier = {"alert_rule": "each_look", "void_alert": 7}
    config = past_of(read_journal(run_dir(probes(3), earlier))).config
    assert config == GuardConfig(refresh_steps=5, advanced=Advanced(alert_rule="each_look"), failed_refresh_alert=7)


def test_from_an_analysis(tmp_path, capsys):
    analysis = synthetic(60)
    path = tmp_path / JSON_NAME
    path.write_text(json.dumps(analysis.to_dict()))
    for where in (tmp_path, path):
        status, out, _ = call(capsys, where, "--cosine", -0.4)
        assert status == 0
        assert f"{path}: cos(pass@1, pass@{max(analysis.settings['ks'])}) on 60 prompts" in out
    old = {name: value for name, value in analysis.to_dict().items() if name != "noise"}
    assert Analysis.from_dict(old).noise is None
    for content, words in ((json.dumps(old), "writes it again"), ("[]", "Expected an analysis"), ("{", "an analysis")):
        path.write_text(content)
        status, out, err = call(capsys, tmp_path)
        assert (status, out) == (1, "")
        assert words in err


def test_the_line_of_a_run():
    line = outlook(probes(3, m=128), GuardConfig(refresh_steps=5), Cost(2.0))
    assert line.startswith("at the noise measured so far, a cosine of -0.20 would be called CONFLICT within ")
    assert " with 90% power on 128 prompts x 16; on 256 prompts within " in line
    assert line.endswith(", +0.4 s per step")


def told(caplog):
    return [r.getMessage() for r in caplog.records if "power" in r.getMessage()]


def test_a_run_says_it_once_and_a_resumed_one_not_again(tmp_path, caplog):
    args = {"save_strategy": "steps", "save_steps": 4}
    with caplog.at_level(logging.INFO, logger="passk_guard"):
        trainer, _ = conflicted(tmp_path, args | {"max_steps": 5})
        trainer.train()
        (line,) = told(caplog)
        assert line.startswith("passk_guard step 2: "), "the third refresh completes the pool"
        trainer, _ = conflicted(tmp_path, args | {"max_steps": 8})
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert told(caplog) == [line]
    events = read_journal(tmp_path).of("refresh")
    assert all(event["noise"]["prompts"] == 90 for event in events)
    assert events[0]["step_seconds"] is None
    assert all(event["step_seconds"] >= 0 for event in events[1:4])
    assert past_of(read_journal(tmp_path)).cost.step_seconds is not None


def test_a_run_stopped_before_it_said_it_says_it_afterwards(tmp_path, caplog):
    args = {"save_strategy": "steps", "save_steps": 2}
    with caplog.at_level(logging.INFO, logger="passk_guard"):
        trainer, _ = conflicted(tmp_path, args | {"max_steps": 2})
        trainer.train()
        assert told(caplog) == []
        trainer, _ = conflicted(tmp_path, args | {"max_steps": 6})
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(told(caplog)) == 1


def test_nothing_that_fails_in_it_reaches_training(tmp_path, caplog, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("planned")

    monkeypatch.setattr("passk_guard.callback.guard.outlook", broken)
    monkeypatch.setattr("passk_guard.reporting.reporter.measure_noise", broken)
    trainer = tiny_lm_trainer(tmp_path, max_steps=4)
    sampler = FixedSampler(trainer.processing_class, lambda row: 0.5)
    guard = guard_of(trainer, sampler=sampler, refresh_steps=1)
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert guard.memory.failures == 0
    events = read_journal(tmp_path).of("refresh")
    assert len(events) == 4
    assert all(event["noise"] is None and event["pass_at_1"] is not None for event in events)
    assert "ZeroDivisionError: planned" in caplog.text


def test_the_pace_is_that_of_the_steps_alone():
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.arrive(0, 1.0) is None
    pace.leave(0)
    now[0] = 13.0  # ten steps of 1 s and a refresh of 3 s
    assert pace.arrive(10, 3.0) == pytest.approx(1.0)
    pace.leave(10)
    pace.forget()
    now[0] = 99.0
    assert pace.arrive(20, 3.0) is None
    pace.leave(20)
    assert pace.arrive(20, 1.0) is None, "no step lies between"
    assert pace.arrive(25, None) is None


def test_costs_that_are_not_known():
    plan = make_plan(average_noise([measure_noise(p, 8) for p in probes(3)]), GuardConfig(), cost=Cost())
    assert all(option.seconds is None and option.share is None for option in plan.options)
    with pytest.raises(GuardError, match="prompts"):
        make_plan(plan.noise, GuardConfig(), prompts=(3,))
