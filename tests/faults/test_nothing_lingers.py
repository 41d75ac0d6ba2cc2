"""A refresh frees what it held when it ends. It does not wait for the garbage collector, which can take hours.

On a GPU that is memory: the collector counts objects and not their bytes.
"""

import gc
import weakref

import pytest
import torch
from transformers import TrainerCallback

from passk_guard.mitigation.protected_direction import Pass1Loss
from passk_guard.probe.records import Rollouts
from passk_guard.probe.timeouts import Aside
from passk_guard.reporting.reporter import quietly
from passk_guard.sketch import ScoreSketcher, TokenBatch
from passk_guard.utils.patching import MethodPatch
from tests.faults.harness import PROJECT, SAMPLERS, Texts, add_guard, make, raises, train
from tests.helpers.tiny import digit_reward


def alive():
    kinds = (torch.Tensor, Rollouts, TokenBatch)
    return sum(issubclass(type(thing), kinds) for thing in gc.get_objects())


def fails_after(original):
    def failing(*args, **kwargs):
        made = original(*args, **kwargs)
        if isinstance(args[-1], TokenBatch) and int(args[-1].slots[0]) == -1:
            return made  # the filler that a rank runs in its place
        raise ArithmeticError(f"not foreseen, with {made.numel()} numbers at hand")

    return failing


class Count(TrainerCallback):
    """Count what is alive before or after the refresh of each step. In between the collector is off."""

    def __init__(self, counts, before):
        self.counts, self.before = counts, before

    def on_step_begin(self, args, state, control, **kwargs):
        if self.before:
            gc.collect()
            gc.disable()
        self.counts.append(alive())
        if not self.before:
            gc.enable()


FAULTS = ["none", "sketch", "harvest", "verifier", "overlong", "raises"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_refresh_leaves_nothing_to_the_collector(fault, tmp_path, monkeypatch):
    if fault == "sketch":
        monkeypatch.setattr(ScoreSketcher, "sketch", fails_after(ScoreSketcher.sketch))
    if fault == "harvest":
        monkeypatch.setattr(Pass1Loss, "__call__", fails_after(Pass1Loss.__call__))
    counts = []
    trainer = make("lm", tmp_path, gradient_accumulation_steps=1, max_steps=5)
    trainer.add_callback(Count(counts, before=True))
    change = SAMPLERS[fault][0] if fault in SAMPLERS else None
    sampler = Texts(trainer.processing_class, change=change)
    correct = raises if fault == "verifier" else digit_reward
    small = {"probe_prompts": 3, "refresh_steps": 1, "pool_refreshes": 1, "image_refreshes": 0, "sketch_dim": 256}
    guard = add_guard(trainer, correct=correct, sampler=sampler, **PROJECT, **small)
    trainer.add_callback(Count(counts, before=False))
    try:
        run = train(trainer, guard)
    finally:
        gc.enable()
    assert run.failed == [fault != "none"] * 5
    before, after = counts[-2:]
    assert after == before


def test_a_patch_that_was_removed_lets_go_at_once(tmp_path):
    class Thing:
        def method(self):
            return 1

    thing, gone = Thing(), []
    held = torch.zeros(1)

    def wrap(original, held=held):
        return lambda: original() + held

    weakref.finalize(held, gone.append, True)
    gc.disable()
    try:
        with MethodPatch(thing, "method", wrap):
            assert thing.method() == 1
        wrap = held = None
        assert gone
    finally:
        gc.enable()


def test_a_call_that_raised_lets_go_at_once():
    class Marked(Exception):
        pass

    def broken():
        raise Marked

    gc.disable()
    try:
        call = Aside(broken)
        with pytest.raises(Marked) as raised:
            call.result()
        gone = weakref.ref(raised.value)
        call._thread.join()
        del raised, call
        assert gone() is None
    finally:
        gc.enable()


def test_a_report_that_fails_with_a_new_text_each_time_is_logged_a_hundred_times(caplog):
    class Part:
        @quietly
        def tell(self, step):
            raise ArithmeticError(f"at step {step}")

    part = Part()
    for step in range(1000):
        part.tell(step)
    assert len(caplog.records) == 100
