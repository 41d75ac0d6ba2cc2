"""Random faults, one for a refresh, in everything that a refresh uses. Training itself is left alone."""

import logging
import random
import sys
import time
from collections import Counter

import torch
from transformers import TrainerCallback

from passk_guard.callback import guard as callback
from passk_guard.mitigation.protected_direction import Pass1Loss
from passk_guard.reporting import reporter
from passk_guard.sketch import ScoreSketcher
from tests.faults.harness import SAMPLERS, VERIFIERS, Broken, Texts, fill_the_disk
from tests.helpers.tiny import digit_reward


def raises(completions, **_):
    raise ValueError(f"no verdict at {time.perf_counter()}")  # a different text each time


FAILING = {f"verifier {verifier.__name__}": verifier for verifier in VERIFIERS} | {"verifier raises": raises}
PARTS = {  # functions of the package that raise
    "estimate": [(callback, "estimate_pooled")],
    "report": [(reporter, name) for name in ("estimate_metrics", "state_change", "one_line")],
    "harvest": [(Pass1Loss, "__call__")],  # only where a direction is taken
}
OTHERS = ["out of memory", "logits are NaN", "disk is full", "tracker raises", "log handler raises"]
SAMPLED = [f"sampler: {fault}" for fault in SAMPLERS]
FAULTS = [*FAILING, *SAMPLED, *PARTS, *OTHERS]


class RandomFaults(TrainerCallback):
    """Choose a fault before the refresh of a step, or none in a share `sound` of the cases, and end it after that.

    Args:
        trainer: of a plain causal LM; add this callback before the guard and `ended` after it.
        monkeypatch: undoes the patches.
        seed: of the choices.
    """

    def __init__(self, trainer, monkeypatch, *, seed=0, sound=0.4):
        self.now, self.seen, self._monkeypatch = None, Counter(), monkeypatch
        self._random, self._sound = random.Random(seed), sound
        self.ended = _Ends(self)
        self.sampler = Texts(trainer.processing_class, change=self._change)
        self._patch(trainer, monkeypatch)

    def on_train_begin(self, args, state, control, **kwargs):
        # transformers looks for the module before training begins, so it comes after that.
        self._monkeypatch.setitem(sys.modules, "wandb", Broken("wandb", lambda: self.now == "tracker raises"))

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % 2 == 0:
            self.now = None if self._random.random() < self._sound else self._random.choice(FAULTS)
            self.seen[self.now] += 1

    def correct(self, completions, **columns):
        """The verifier."""
        return FAILING.get(self.now, digit_reward)(completions, **columns)

    def _change(self, samples):
        fault = SAMPLERS.get((self.now or "").removeprefix("sampler: "))
        return fault[0](samples) if fault is not None else samples

    def _patch(self, trainer, monkeypatch):
        for name, places in PARTS.items():
            for place, attribute in places:
                monkeypatch.setattr(place, attribute, self._raising(name, getattr(place, attribute)))
        monkeypatch.setattr(ScoreSketcher, "sketch", self._short_of_memory(ScoreSketcher.sketch))
        fill_the_disk(monkeypatch, lambda: self.now == "disk is full")
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


class _Ends(TrainerCallback):
    def __init__(self, faults):
        self._faults = faults

    def on_step_begin(self, args, state, control, **kwargs):
        self._faults.now = None


class _Handler(logging.Handler):
    def __init__(self, faults):
        super().__init__()
        self._faults = faults

    def emit(self, record):
        if self._faults.now == "log handler raises":
            raise ConnectionError("the log server is down")
