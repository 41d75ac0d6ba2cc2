"""Trainers that are stopped, trained again, crashed in, guarded twice or late: the guard is never in the way."""

import os
import signal
import time

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from passk_guard import GuardError
from passk_guard.callback.state import load_memory
from tests.faults.harness import KINDS, PROJECT, At, Run, Texts, add_guard, assert_same, make, train
from tests.helpers.tiny import tiny_rows, tiny_tokenizer


def always_failing(completions, **_):
    raise ValueError("no verdict")


def refreshes(run):
    return [e["step"] for e in run.events if e["event"] in ("refresh", "failed_refresh")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [{}, {"correct": always_failing} | PROJECT], ids=["observe", "failed refresh"])
def test_train_called_twice(kind, config, tmp_path):
    runs = []
    for guarded in (False, True):
        trainer = make(kind, tmp_path / str(guarded), max_steps=2)
        guard = add_guard(trainer, **config) if guarded else None
        first = train(trainer, guard)
        runs.append((first, train(trainer, guard)))
    for found, expected in zip(runs[1], runs[0], strict=True):
        assert_same(found, expected)
    assert refreshes(runs[1][1]) == [0, 0]
    assert guard.memory.voids + len(guard.memory.history) == 1, "the second one remembers nothing of the first"
    assert not torch.equal(*(run.weights["lm_head.weight"] for run in runs[0])), "the second one trains on"


def test_the_same_callback_added_twice_acts_once(references, tmp_path):
    trainer = make("lm", tmp_path)
    guard = add_guard(trainer, sampler=Texts(trainer.processing_class))
    trainer.add_callback(guard)
    trainer.add_callback(guard)
    run = train(trainer, guard)
    assert refreshes(run) == [0, 2]
    assert len(run.of("start")) == 1
    assert [row["step"] for row in trainer.state.log_history if "passk_guard/pass_at_1" in row] == [1, 3]
    assert_same(run, references.of("lm"))
    trainer.remove_callback(guard)
    assert guard not in trainer.callback_handler.callbacks, "one removal takes it off"


def test_two_guards_are_refused_before_anything_is_touched(references, tmp_path):
    trainer = make("lm", tmp_path)
    first, second = add_guard(trainer, **PROJECT), add_guard(trainer, **PROJECT)
    run = train(trainer)
    assert isinstance(run.error, GuardError)
    assert "found 2" in str(run.error)
    assert "log" not in vars(trainer)
    assert "backward" not in vars(trainer.accelerator)
    trainer.remove_callback(first)
    trainer.remove_callback(second)
    assert_same(train(trainer), references.of("lm"))


def test_a_guard_added_after_a_resume(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    whole = train(make("lm", tmp_path / "whole", **saved))
    trainer = make("lm", tmp_path / "late", **saved)
    guard = add_guard(trainer, correct=always_failing, sampler=Texts(trainer.processing_class), **PROJECT)
    run = train(trainer, guard, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert run.error is None
    assert refreshes(run) == [2]
    assert_same(run, whole)


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "on_log"])
def test_a_guard_added_while_training_goes_on(event, references, tmp_path):
    trainer = make("lm", tmp_path)
    guard = add_guard(trainer, correct=always_failing, sampler=Texts(trainer.processing_class), **PROJECT)
    trainer.remove_callback(guard)
    trainer.add_callback(At(event, 1, lambda: trainer.add_callback(guard)))
    run = train(trainer, guard)
    assert run.error is None
    assert refreshes(run) == [2]
    assert_same(run, references.of("lm"))
    assert "log" not in vars(trainer)


class PowerCut(Exception):
    pass


def crash():
    raise PowerCut


EVENTS = {"on_step_begin": 0, "on_pre_optimizer_step": 1, "on_step_end": 1, "on_log": 1}


@pytest.mark.parametrize("event", EVENTS)
def test_an_exception_in_a_callback_of_the_user(event, tmp_path):
    """The same end, and training again goes as if nobody had been there."""
    runs = []
    for guarded in (False, True):
        trainer = make("lm", tmp_path / str(guarded), max_steps=3)
        guard = add_guard(trainer, sampler=Texts(trainer.processing_class)) if guarded else None
        at = At(event, EVENTS[event], crash)
        trainer.add_callback(at)
        first = train(trainer, guard)
        assert isinstance(first.error, PowerCut)
        trainer.remove_callback(at)
        runs.append((first, train(trainer, guard)))
        assert runs[-1][1].error is None
    assert {name: bits.tolist() for name, bits in runs[1][0].weights.items()} == {
        name: bits.tolist() for name, bits in runs[0][0].weights.items()
    }
    assert_same(runs[1][1], runs[0][1])


def test_a_guard_taken_off_after_a_crash_turns_no_more_steps(tmp_path):
    runs = []
    for guarded in (False, True):
        trainer = make("lm", tmp_path / str(guarded), max_steps=3)
        guard = add_guard(trainer, sampler=Texts(trainer.processing_class), **PROJECT) if guarded else None
        at = At("on_step_begin", 0, crash)  # after the probe, with a direction to protect
        trainer.add_callback(at)
        assert isinstance(train(trainer).error, PowerCut)
        trainer.remove_callback(at)
        if guard is not None:
            assert guard._mitigator.steps.protected is not None
            trainer.remove_callback(guard)
        runs.append(train(trainer))
    assert_same(runs[1], runs[0])


def test_another_guard_after_a_crash(tmp_path):
    trainer = make("lm", tmp_path)
    first, at = add_guard(trainer, **PROJECT), At("on_step_end", 1, crash)
    trainer.add_callback(at)
    assert isinstance(train(trainer).error, PowerCut)
    trainer.remove_callback(first)
    trainer.remove_callback(at)
    second = add_guard(trainer, refresh_steps=1)
    run = train(trainer, second)
    assert run.error is None
    assert len(second.memory.history) == 3
    assert "backward" not in vars(trainer.accelerator)
    assert "log" not in vars(trainer)
    assert not [name for name in vars(trainer) if name.startswith("_passk_guard")]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_checkpoints_on_the_steps_of_refreshes(kind, tmp_path):
    runs = []
    for guarded in (False, True):
        trainer = make(kind, tmp_path / str(guarded), per_device_eval_batch_size=8, save_strategy="steps", save_steps=1)
        trainer.eval_dataset = Dataset.from_list(tiny_rows(4)) if kind == "grpo" else list(trainer.train_dataset)[:8]
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 1
        if kind == "lm":
            trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = True, "eval_loss"
        guard = add_guard(trainer, refresh_steps=1) if guarded else None
        runs.append(train(trainer, guard))
        assert runs[-1].error is None
    assert sum("eval_" in row for row in runs[0].rows) == 4
    assert len(runs[1].of("refresh")) == 4
    assert_same(runs[1], runs[0])
    for step in range(1, 5):
        plain, watched = (tmp_path / str(guarded) / f"checkpoint-{step}" for guarded in (False, True))
        memory = load_memory(watched)
        assert memory is not None
        assert memory.step == step - 1, "that of the refresh before the step"
        states = [torch.load(folder / "rng_state.pth", weights_only=False)["cpu"] for folder in (plain, watched)]
        assert torch.equal(*states)


class Terminate(TrainerCallback):
    """SIGTERM to this very process, after the guard's probe and before the optimizer's step."""

    def __init__(self, event):
        setattr(self, event, self._send)

    def _send(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # transformers' handler starts a timer


@pytest.mark.parametrize("config", [{}, {"correct": always_failing} | PROJECT], ids=["observe", "failed refresh"])
def test_sigterm_between_probe_and_step(config, tmp_path):
    """transformers writes a checkpoint there and stops; it is that of no guard, and so is what is resumed from it."""
    resumed, cut = [], []
    for guarded in (False, True):
        folder, settings = tmp_path / str(guarded), {"enable_jit_checkpoint": True, "max_steps": 5}
        trainer = make("lm", folder, **settings)
        for callback in trainer.callback_handler.callbacks:
            if getattr(callback, "jit_manager", None) is not None:
                callback.jit_manager.kill_wait = 0
        texts = Texts(tiny_tokenizer())
        guard = add_guard(trainer, sampler=texts, **config) if guarded else None
        trainer.add_callback(Terminate("on_step_begin"))
        cut.append(train(trainer, guard))
        assert cut[-1].error is None
        assert trainer.state.global_step < 5
        checkpoint = next(folder.glob("checkpoint-*"))
        trainer = make("lm", folder, max_steps=5)
        guard = add_guard(trainer, sampler=texts, **config) if guarded else None
        resumed.append(train(trainer, guard, resume_from_checkpoint=str(checkpoint)))
        assert resumed[-1].error is None
    assert_same(cut[1], cut[0])
    assert_same(resumed[1], resumed[0])


def test_sigterm_in_the_middle_of_the_probe_ends_the_run_as_the_users_handler_says(tmp_path):
    def handler(number, frame):
        raise SystemExit(143)

    def verifier(completions, **_):
        os.kill(os.getpid(), signal.SIGTERM)
        return [1.0] * len(completions)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        trainer = make("lm", tmp_path)
        guard = add_guard(trainer, correct=verifier, sampler=Texts(trainer.processing_class))
        with pytest.raises(SystemExit):
            trainer.train()
        run = Run(trainer, guard)
        assert [e["event"] for e in run.events] == ["start"], "whole lines only"
        assert trainer.state.global_step == 0
    finally:
        signal.signal(signal.SIGTERM, before)
