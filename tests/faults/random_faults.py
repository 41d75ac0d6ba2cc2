"""Faults drawn at random, one for a refresh, in everything that a refresh touches; training itself is never touched."""

import asyncio
import errno
import logging
import random
import sys
import time
import types
from collections import Counter
from pathlib import Path

import torch
from transformers import TrainerCallback

from passk_guard.callback import guard as callback
from passk_guard.mitigation.protected_direction import Pass1Loss
from passk_guard.reporting import reporter
from passk_guard.reporting.journal import JOURNAL_NAME
from passk_guard.sketch import ScoreSketcher
from tests.faults.harness import Texts
from tests.faults.test_probe_faults import SAMPLERS, hangs, hangs_busily
from tests.helpers.tiny import digit_reward


def raises(completions, **_):
    raise ValueError(f"no verdict at {time.perf_counter()}")  # each time in other words


async def hangs_later(completions, **_):
    await asyncio.sleep(60)


VERIFIERS = {
    "verifier raises": raises,
    "verifier hangs": hangs,
    "verifier computes for ever": hangs_busily,
    "verifier waits for ever": hangs_later,
    "verifier returns NaN": lambda completions, **_: [float("nan")] * len(completions),
    "verifier returns strings": lambda completions, **_: ["correct"] * len(completions),
    "verifier returns nothing": lambda completions, **_: None,
}
PARTS = {  # functions of ours that raise
    "estimate": [(callback, "estimate_pooled")],
    "report": [(reporter, name) for name in ("estimate_metrics", "state_change", "one_line")],
    "harvest": [(Pass1Loss, "__call__")],  # only where a direction is taken
}
OTHERS = ["out of memory", "logits are NaN", "disk is full", "tracker raises", "log handler raises"]
SAMPLED = [f"sampler: {fault}" for fault in SAMPLERS]


class RandomFaults(TrainerCallback):
    """Draws a fault before the refresh of a step, or none in `sound` of the cases, and ends it after that.

    Args:
        trainer: of a plain causal LM; add this callback before the guard and `ended` after it.
        monkeypatch: undoes what is put in the way.
        seed: of the draws.
    """

    def __init__(self, trainer, monkeypatch, *, seed=0, sound=0.4):
        self.now, self.seen, self._monkeypatch = None, Counter(), monkeypatch
        self._random, self._sound = random.Random(seed), sound
        self._names = [*VERIFIERS, *SAMPLED, *PARTS, *OTHERS]
        self.ended = _Ends(self)
        self.sampler = Texts(trainer.processing_class, change=self._change)
        self._put_in_the_way(trainer, monkeypatch)

    def on_train_begin(self, args, state, control, **kwargs):
        # transformers looks for the module before training begins, so it comes after that.
        self._monkeypatch.setitem(sys.modules, "wandb", _Tracker(self))

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % 2 == 0:
            self.now = None if self._random.random() < self._sound else self._random.choice(self._names)
            self.seen[self.now] += 1

    def correct(self, completions, **columns):
        """The verifier."""
        return VERIFIERS.get(self.now, digit_reward)(completions, **columns)

    def _change(self, samples):
        fault = SAMPLERS.get((self.now or "").removeprefix("sampler: "))
        return fault[0](samples) if fault is not None else samples

    def _put_in_the_way(self, trainer, monkeypatch):
        for name, places in PARTS.items():
            for place, attribute in places:
                monkeypatch.setattr(place, attribute, self._raising(name, getattr(place, attribute)))
        monkeypatch.setattr(ScoreSketcher, "sketch", self._short_of_memory(ScoreSketcher.sketch))
        monkeypatch.setattr(Path, "open", self._full(Path.open))
        trainer.model.model.norm.register_forward_hook(
            lambda module, args, output: output * float("nan") if self.now == "logits are NaN" else None
        )
        logger = logging.getLogger("passk_guard")
        monkeypatch.setattr(logger, "handlers", [*logger.handlers, _Handler(self)])

    def _raising(self, name, original):
        def raising(*args, **kwargs):
            if self.now == name:
                raise ArithmeticError(f"not foreseen at {time.perf_counter()}")
            return original(*args, **kwargs)

        return raising

    def _short_of_memory(self, sketch):
        def short(*args, **kwargs):
            made = sketch(*args, **kwargs)
            if self.now == "out of memory":
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {made.numel()} GiB")
            return made

        return short

    def _full(self, opened):
        def full(path, mode="r", **kwargs):
            file = opened(path, mode, **kwargs)
            return _Full(file) if self.now == "disk is full" and path.name == JOURNAL_NAME and mode == "a" else file

        return full


class _Ends(TrainerCallback):
    def __init__(self, faults):
        self._faults = faults

    def on_step_begin(self, args, state, control, **kwargs):
        self._faults.now = None


class _Full:
    """A file on a disk that has room for half a line."""

    def __init__(self, file):
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, text):
        self._file.write(text[:20])
        self._file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


class _Tracker(types.ModuleType):
    """A tracker in which nothing stays, and which is down at times."""

    AlertLevel = types.SimpleNamespace(WARN="warn")
    run = object()

    def __init__(self, faults):
        super().__init__("wandb")
        self._faults = faults

    def alert(self, *_, **__):
        if self._faults.now == "tracker raises":
            raise ConnectionError("the tracker is down")

    log = Image = alert


class _Handler(logging.Handler):
    def __init__(self, faults):
        super().__init__()
        self._faults = faults

    def emit(self, record):
        if self._faults.now == "log handler raises":
            raise ConnectionError("the log server is down")
