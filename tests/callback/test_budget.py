"""The budget: work in tokens, the cadence that follows from it, and the same decisions on resuming."""

import logging
import math
from itertools import pairwise

import pytest
import torch

from passk_guard import GuardConfig, GuardError
from passk_guard.callback.budget import (
    FORWARD,
    SAMPLING,
    TRAINING,
    Account,
    Meter,
    probe_size,
    refreshes_that_fit,
    training_work,
)
from passk_guard.callback.state import load_memory
from passk_guard.probe.records import Rollouts
from passk_guard.reporting.journal import read_journal
from tests.callback.test_guard import FixedSampler, guard_of
from tests.helpers.tiny import tiny_grpo_trainer, tiny_lm_trainer

BUDGET = {"refresh_steps": None, "num_samples": 8, "probe_prompts": 6}


def run_account(cost, step_work, overhead, steps):
    """Steps at which refreshes of this cost happen, and the account at the end."""
    account, found = Account(), []
    for step in range(steps):
        account = account.with_work(step_work if step else 0, 0)
        if account.allows(step, overhead):
            account = account.with_work(0, cost).after_refresh(step, overhead, failed=False)
            found.append(step)
        elif step >= account.due:
            account = account.planned(step, overhead)
    return found, account


@pytest.mark.parametrize(("cost", "step_work", "overhead"), [(4000, 1000, 0.1), (100, 1000, 0.1), (999, 10, 0.5)])
def test_the_share_stays_within_the_budget_and_one_refresh(cost, step_work, overhead):
    found, account = run_account(cost, step_work, overhead, 2000)
    assert found[0] == 0
    assert account.probe == cost * len(found)
    assert account.share <= overhead + cost / account.run
    assert account.share >= overhead - cost / account.run, "the budget is spent"
    gaps = {later - earlier for earlier, later in pairwise(found[1:])}
    assert gaps <= {math.floor(cost / overhead / step_work), math.ceil(cost / overhead / step_work)} - {0}
    assert account.cadence(1999, overhead) == max(1, round(cost / overhead / step_work))


def test_a_failed_refresh_is_tried_again_soon_and_not_at_once():
    account = Account().with_work(1000, 0).after_refresh(7, 0.1, failed=True)
    assert (account.due, account.refreshes) == (12, 1)
    assert not account.allows(11, 0.1)
    assert account.allows(12, 0.1)


def test_where_the_work_of_training_is_unknown_the_cadence_is_fixed():
    found, account = run_account(100, 0, 0.1, 16)
    assert found == [0, 1, 6, 11]
    assert account.share is None


class _TRL:
    beta, num_iterations = 0.0, 1

    def compute_loss(self, model, inputs):
        return None


def test_work_of_a_batch():
    ids = torch.zeros(4, 10, dtype=torch.int64)
    assert training_work(object(), {"input_ids": ids}) == 40 * TRAINING
    batch = {"prompt_ids": ids, "completion_ids": ids[:, :5]}
    assert training_work(_TRL, batch) == 60 * TRAINING + 40 * FORWARD + 20 * SAMPLING
    twice = type("T", (), {"beta": 0.1, "num_iterations": 2})
    assert training_work(twice, batch) == 60 * TRAINING + (40 * FORWARD + 20 * SAMPLING + 60 * FORWARD) // 2
    assert training_work(object(), [1, 2]) == 0


def test_the_probe_counts_padding_as_a_batch_of_training_does():
    meter = Meter(_TRL())
    prompts, completions = [[2] * 5] * 3, [[2] * length for length in (1, 2, 5)]
    meter.charge_sampling(Rollouts([{}] * 3, [0, 1, 2], prompts, completions, [""] * 3, 3))
    meter.charge(trained=7, scored=11)
    ids = torch.zeros(3, 5, dtype=torch.int64)
    sampled = training_work(_TRL, {"prompt_ids": ids, "completion_ids": ids}) - 30 * TRAINING
    assert meter.probe == sampled + 7 * TRAINING + 11 * FORWARD


def test_a_probe_that_always_fails_keeps_to_the_budget_too(tmp_path):
    def broken(completions, **_):
        raise ValueError("no sandbox")

    trainer = tiny_lm_trainer(tmp_path, max_steps=40)
    guard = guard_of(trainer, correct=broken, **(BUDGET | {"overhead": 2.0, "verbosity": "quiet"}))
    trainer.train()
    failed, account = len(read_journal(tmp_path).of("failed_refresh")), guard.memory.account
    assert 1 < failed == account.refreshes < 8, "every 5 steps there would be 8"
    assert 0 < account.share <= 2.0 + account.refresh / account.run


def test_the_pace_is_said_once(tmp_path, caplog):
    trainer = tiny_lm_trainer(tmp_path, max_steps=10)
    trainer.state.max_steps, voice = 10, guard_of(trainer, **BUDGET)._voice
    account = Account(run=100, probe=500, refreshes=1)
    voice.cadence(1, account)
    voice.cadence(5, account)
    assert len([r for r in caplog.records if "is as much work as" in r.getMessage()]) == 1


@pytest.mark.parametrize(("make", "overhead"), [(tiny_lm_trainer, 8.0), (tiny_grpo_trainer, 2.0)])
def test_a_run_keeps_to_it(make, overhead, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="passk_guard"):
        trainer = make(tmp_path, max_steps=40, logging_steps=1)
        guard = guard_of(trainer, **(BUDGET | {"overhead": overhead}))
        trainer.train()
    steps = [event["step"] for event in read_journal(tmp_path).of("refresh")]
    account = guard.memory.account
    assert steps[0] == 0
    assert 2 <= len(steps) < 20
    assert account.refreshes == len(steps)
    assert abs(account.share - overhead) <= account.refresh / account.run
    shares = [row["passk_guard/probe_share"] for row in trainer.state.log_history if "passk_guard/probe_share" in row]
    assert shares[-1] <= overhead + account.refresh / (account.probe / shares[-1]), "of the work by then"
    assert account.share < shares[-1], "training went on"
    lines = [r.getMessage() for r in caplog.records if "is as much work as" in r.getMessage()]
    assert len(lines) == 1
    assert "compute_loss" not in vars(trainer), "the trainer has its method back"


def test_a_resumed_run_refreshes_where_the_uninterrupted_one_does(tmp_path):
    def refreshed(folder, **steps):
        trainer = tiny_lm_trainer(folder, save_strategy="steps", save_steps=4, **steps)
        guard_of(trainer, sampler=FixedSampler(trainer.processing_class, lambda row: 0.5), **(BUDGET | {"overhead": 8}))
        return trainer

    whole = refreshed(tmp_path / "whole", max_steps=12)
    whole.train()
    refreshed(tmp_path / "cut", max_steps=4).train()
    refreshed(tmp_path / "cut", max_steps=12).train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    memories = [load_memory(tmp_path / name / "checkpoint-12") for name in ("whole", "cut")]
    assert memories[0].account == memories[1].account
    steps = [[e["step"] for e in read_journal(tmp_path / name).of("refresh")] for name in ("whole", "cut")]
    assert steps[0] == steps[1]
    assert len(steps[0]) > 2


def test_a_budget_too_small_for_the_run_is_said(tmp_path, caplog):
    trainer = tiny_lm_trainer(tmp_path, max_steps=6)
    guard_of(trainer, **(BUDGET | {"overhead": 0.01}))
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        trainer.train()
    (line,) = [r.getMessage() for r in caplog.records if "is as much work as" in r.getMessage()]
    assert "; 1 refresh fits into the 6 steps of this run at overhead=0.01; for 4, set `overhead` to " in line
    assert line.endswith(" or lower `num_samples`")


def test_the_size_of_the_probe_follows_the_run(tmp_path):
    trainer = tiny_grpo_trainer(tmp_path, max_steps=4)
    sizes = [probe_size(trainer, GuardConfig(), steps) for steps in (10, 10**4, 10**7)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (16, 64)
    for steps in (10**3, 10**4, 10**5):
        size = probe_size(trainer, GuardConfig(), steps)
        assert size in (16, 64) or refreshes_that_fit(trainer, GuardConfig(), steps, size) >= 8
    assert probe_size(trainer, GuardConfig(probe_prompts=40), 10) == 40
    assert probe_size(trainer, GuardConfig(refresh_steps=5), 10) == 64


@pytest.mark.parametrize("value", [0, -1, 101, "much"])
def test_no_budget(value):
    with pytest.raises((GuardError, ValueError), match="overhead"):
        GuardConfig(overhead=value)
