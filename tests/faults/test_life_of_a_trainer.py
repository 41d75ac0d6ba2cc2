"""Trainers that are stopped, trained again, crashed in, guarded twice or late: the guard is never in the way."""

import os
import signal
import time

import pytest
import torch
from datasets import Dataset
from transformers.trainer_utils import IntervalStrategy

from passk_guard import GuardError
from passk_guard.callback.state import load_memory
from tests.faults.harness import KINDS, PROJECT, At, Run, Texts, add_guard, assert_same, make, raises, train
from tests.helpers.tiny import tiny_rows

FAILING = {"correct": raises} | PROJECT
OBSERVED_AND_FAILING = pytest.mark.parametrize("config", [{}, FAILING], ids=["observe", "failing"])
SAVED = {"save_strategy": "steps", "save_steps": 2}


def guard_on_texts(trainer, **config):
    return add_guard(trainer, sampler=Texts(trainer.processing_class), **config)


def assert_nothing_left(trainer):
    assert "log" not in vars(trainer)
    assert "backward" not in vars(trainer.accelerator)
    assert not [name for name in vars(trainer) if name.startswith("_passk_guard")]


def unguarded_and_guarded(tmp_path, go):
    """What `go(folder, guarded)` returns for both."""
    return [go(tmp_path / str(guarded), guarded) for guarded in (False, True)]


@pytest.mark.parametrize("kind", KINDS)
@OBSERVED_AND_FAILING
def test_train_called_twice(kind, config, tmp_path):
    def go(folder, guarded):
        trainer = make(kind, folder, max_steps=2)
        guard = add_guard(trainer, **config) if guarded else None
        return train(trainer, guard), train(trainer, guard)

    plain, guarded = unguarded_and_guarded(tmp_path, go)
    for found, expected in zip(guarded, plain, strict=True):
        assert_same(found, expected)
    assert [step for step, _ in guarded[1].refreshes] == [0, 0]
    memory = guarded[1].guard.memory
    assert memory.failures + len(memory.history) == 1, "the second run remembers nothing of the first"
    assert not torch.equal(*(run.weights["lm_head.weight"] for run in plain)), "the second run trains on"


def test_the_same_callback_added_twice_acts_once(references, tmp_path):
    trainer = make("lm", tmp_path)
    guard = guard_on_texts(trainer)
    trainer.add_callback(guard)
    trainer.add_callback(guard)
    run = train(trainer, guard)
    assert run.refreshes == [(0, "refresh"), (2, "refresh")]
    assert len(run.of("start")) == 1
    assert [row["step"] for row in trainer.state.log_history if "passk_guard/pass_at_1" in row] == [1, 3]
    assert_same(run, references.of("lm"))
    trainer.remove_callback(guard)
    assert guard not in trainer.callback_handler.callbacks, "one removal takes it off"


def test_two_guards_are_refused_before_anything_is_changed(references, tmp_path):
    trainer = make("lm", tmp_path)
    guards = [add_guard(trainer, **PROJECT) for _ in range(2)]
    run = train(trainer)
    assert isinstance(run.error, GuardError)
    assert "found 2" in str(run.error)
    assert_nothing_left(trainer)
    for guard in guards:
        trainer.remove_callback(guard)
    assert_same(train(trainer), references.of("lm"))


def test_a_guard_added_after_a_resume(tmp_path):
    whole = train(make("lm", tmp_path / "whole", **SAVED))
    trainer = make("lm", tmp_path / "late", **SAVED)
    guard = guard_on_texts(trainer, **FAILING)
    run = train(trainer, guard, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert run.error is None
    assert run.refreshes == [(2, "failed_refresh")]
    assert_same(run, whole)


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "on_log"])
def test_a_guard_added_during_training(event, references, tmp_path):
    trainer = make("lm", tmp_path)
    guard = guard_on_texts(trainer, **FAILING)
    trainer.remove_callback(guard)
    trainer.add_callback(At(event, 1, lambda: trainer.add_callback(guard)))
    run = train(trainer, guard)
    assert run.error is None
    assert run.refreshes == [(2, "failed_refresh")]
    assert_same(run, references.of("lm"))
    assert_nothing_left(trainer)


class PowerCut(Exception):
    pass


def crash():
    raise PowerCut


def train_to_a_crash(trainer, event, step):
    """Train until an exception of the user's callback, and take that callback off."""
    at = At(event, step, crash)
    trainer.add_callback(at)
    run = train(trainer)
    assert isinstance(run.error, PowerCut)
    trainer.remove_callback(at)
    return run


@pytest.mark.parametrize(
    ("event", "step"), [("on_step_begin", 0), ("on_pre_optimizer_step", 1), ("on_step_end", 1), ("on_log", 1)]
)
def test_an_exception_in_a_callback_of_the_user(event, step, tmp_path):
    """The run ends as it does without a guard, and so does the next one."""

    def go(folder, guarded):
        trainer = make("lm", folder, max_steps=3)
        guard = guard_on_texts(trainer) if guarded else None
        return train_to_a_crash(trainer, event, step), train(trainer, guard)

    plain, guarded = unguarded_and_guarded(tmp_path, go)
    assert guarded[1].error is None
    assert all(torch.equal(bits, plain[0].weights[name]) for name, bits in guarded[0].weights.items())
    assert_same(guarded[1], plain[1])


def test_a_guard_taken_off_after_a_crash_projects_no_more_steps(tmp_path):
    def go(folder, guarded):
        trainer = make("lm", folder, max_steps=3)
        guard = guard_on_texts(trainer, **PROJECT) if guarded else None
        train_to_a_crash(trainer, "on_step_begin", 0)  # after the probe, with a direction to protect
        if guarded:
            assert guard._mitigator.steps.protected is not None
            trainer.remove_callback(guard)
        return train(trainer)

    plain, guarded = unguarded_and_guarded(tmp_path, go)
    assert_same(guarded, plain)


def test_another_guard_after_a_crash(tmp_path):
    trainer = make("lm", tmp_path)
    first = add_guard(trainer, **PROJECT)
    train_to_a_crash(trainer, "on_step_end", 1)
    trainer.remove_callback(first)
    second = add_guard(trainer, refresh_steps=1)
    run = train(trainer, second)
    assert run.error is None
    assert len(second.memory.history) == 3
    assert_nothing_left(trainer)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_checkpoints_on_the_steps_of_refreshes(kind, tmp_path):
    def go(folder, guarded):
        trainer = make(kind, folder, per_device_eval_batch_size=8, save_strategy="steps", save_steps=1)
        trainer.eval_dataset = Dataset.from_list(tiny_rows(4)) if kind == "grpo" else list(trainer.train_dataset)[:8]
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 1
        if kind == "lm":
            trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = True, "eval_loss"
        run = train(trainer, add_guard(trainer, refresh_steps=1) if guarded else None)
        assert run.error is None
        return run

    plain, guarded = unguarded_and_guarded(tmp_path, go)
    assert sum("eval_" in row for row in plain.rows) == 4
    assert guarded.failed == [False] * 4
    assert_same(guarded, plain)
    for step in range(1, 5):
        folders = [tmp_path / name / f"checkpoint-{step}" for name in ("False", "True")]
        assert load_memory(folders[1]).step == step - 1, "that of the refresh before the step"
        states = [torch.load(folder / "rng_state.pth", weights_only=False)["cpu"] for folder in folders]
        assert torch.equal(*states)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)  # transformers' handler starts a timer


@OBSERVED_AND_FAILING
def test_sigterm_between_probe_and_step(config, tmp_path):
    """transformers writes a checkpoint and stops. The checkpoint and the run resumed from it are unguarded ones."""

    def go(folder, guarded):
        trainer = make("lm", folder, enable_jit_checkpoint=True, max_steps=5)
        for callback in trainer.callback_handler.callbacks:
            if getattr(callback, "jit_manager", None) is not None:
                callback.jit_manager.kill_wait = 0
        guard = guard_on_texts(trainer, **config) if guarded else None
        trainer.add_callback(At("on_step_begin", 2, terminate))
        cut = train(trainer, guard)
        assert cut.error is None
        assert trainer.state.global_step < 5
        trainer = make("lm", folder, max_steps=5)
        guard = guard_on_texts(trainer, **config) if guarded else None
        resumed = train(trainer, guard, resume_from_checkpoint=str(next(folder.glob("checkpoint-*"))))
        assert resumed.error is None
        return cut, resumed

    plain, guarded = unguarded_and_guarded(tmp_path, go)
    for found, expected in zip(guarded, plain, strict=True):
        assert_same(found, expected)


def test_sigterm_in_the_middle_of_the_probe_ends_the_run_as_the_users_handler_says(tmp_path):
    def handler(number, frame):
        raise SystemExit(143)

    def verifier(completions, **_):
        os.kill(os.getpid(), signal.SIGTERM)
        return [1.0] * len(completions)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        trainer = make("lm", tmp_path)
        guard = guard_on_texts(trainer, correct=verifier)
        with pytest.raises(SystemExit):
            trainer.train()
        run = Run(trainer, guard)
        assert [e["event"] for e in run.events] == ["start"], "whole lines only"
        assert trainer.state.global_step == 0
    finally:
        signal.signal(signal.SIGTERM, before)
