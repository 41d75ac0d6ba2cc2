"""600 to 1,200 steps with faults all the way: nothing grows, nothing is left, and training is bit for bit unguarded."""

import gc
import io
import json
import logging
import math
import signal
from pathlib import Path

import pytest
import torch
from transformers import PrinterCallback

from passk_guard.estimation.records import ConflictCurve
from passk_guard.reporting.trackers import curve_figure, kernel_figure
from tests.faults.gauges import Gauges, files, hooks, replaced, threads
from tests.faults.harness import PROJECT, add_guard, assert_same, make, train
from tests.faults.random_faults import FAULTS, RandomFaults

LONG = {"gradient_accumulation_steps": 1, "logging_steps": 20}
CHEAP = {"k": 2, "probe_prompts": 3, "num_samples": 4, "refresh_steps": 2, "sketch_dim": 256, "verifier_timeout": 0.05}
MB = 2**20
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc here, where handles and memory are read"),
]


class Soak:
    """One run with its gauges; unguarded, or guarded with a fault in most refreshes."""

    def __init__(self, folder, monkeypatch, *, steps, every, guarded, **config):
        # pytest's handlers would keep every record of the run, with all that its arguments hold.
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        trainer = make("lm", folder, max_steps=steps, **LONG)
        trainer.remove_callback(PrinterCallback)
        self.gauges, self.faults, guard = Gauges(every), None, None
        if guarded:
            self.faults = RandomFaults(trainer, monkeypatch)
            trainer.add_callback(self.faults)
            guard = add_guard(trainer, correct=self.faults.correct, sampler=self.faults.sampler, **CHEAP, **config)
            trainer.add_callback(self.faults.ended)
            trainer.args.report_to = ["wandb"]
        trainer.add_callback(self.gauges)
        open_fonts()
        self.before = self._left(trainer)
        self.run = train(trainer, guard)
        gc.collect()
        self.after = self._left(trainer)
        self.replaced = replaced(trainer, trainer.accelerator, *trainer.model.modules())

    @staticmethod
    def _left(trainer):
        return {
            "files": files(),
            "hooks": hooks(trainer.model),
            "threads": threads(),
            "alarm": signal.getsignal(signal.SIGVTALRM),
            "timer": signal.getitimer(signal.ITIMER_VIRTUAL),
            "methods": replaced(trainer),
        }


CHECKS = 1000
"""Records that a run keeps by design in 1000 steps with 500 refreshes: one check of the angle and one of the change."""


def open_fonts():
    """matplotlib keeps the files of the fonts open that a picture has used: two, once in a process."""
    k = torch.arange(2, 17)
    values = torch.linspace(-1, 1, 15, dtype=torch.float64)
    curve = ConflictCurve(k, values, values - 0.1, values + 0.1, values < 0, values - 0.2, values + 0.2)
    for figure in (kernel_figure(torch.eye(4), "kernel"), curve_figure(curve, 2, "curve")):
        figure.savefig(io.BytesIO(), format="png")


def assert_nothing_grows(gauges, after):
    """Assert it with tolerances that see a tensor kept by one refresh in a hundred, and 8 kB kept by each."""
    assert len([step for step in gauges.steps if step >= after]) >= 10, "too few readings for a slope"
    assert gauges.spread("files", after) == 0
    assert gauges.spread("hooks", after) == 0
    assert gauges.slope("tensors", after) < 2
    assert gauges.slope("objects", after) < 50 + CHECKS
    assert gauges.spread("lingering", after) < 60, "the collector finds little to do"
    assert gauges.slope("resident", after) < 4 * MB


def assert_nothing_is_left(soak, control):
    assert soak.run.error is None
    assert soak.after == soak.before
    assert soak.replaced == control.replaced


def assert_reported(soak, refreshes):
    """Every line of the journal is JSON, nearly every refresh has one, and every fault occurred and gave its reason."""
    lines = (Path(soak.run.trainer.args.output_dir) / "passk_guard.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    steps = [event["step"] for event in events if event["event"] in ("refresh", "failed_refresh")]
    assert steps == sorted(set(steps))
    assert len(steps) == refreshes - soak.faults.seen["disk is full"] - soak.faults.seen["report"]
    assert all(soak.faults.seen[name] > 0 for name in FAULTS), soak.faults.seen
    reasons = " ".join(event["reason"] for event in events if event["event"] == "failed_refresh")
    for words in (
        "raised on each",
        "still running",
        "of type str",
        "NoneType",
        "positions",
        "not finite",
        "not foreseen",
    ):
        assert words in reasons, words
    assert {event["event"] for event in events} >= {"start", "refresh", "failed_refresh"}


@pytest.mark.parametrize("steps", [600, pytest.param(1200, marks=pytest.mark.nightly)])
def test_observing(steps, tmp_path, monkeypatch):
    control = Soak(tmp_path / "control", monkeypatch, steps=steps, every=steps // 24, guarded=False)
    soak = Soak(tmp_path / "guarded", monkeypatch, steps=steps, every=steps // 24, guarded=True)
    monkeypatch.undo()
    shown(control, soak)
    assert_same(soak.run, control.run)
    assert_nothing_is_left(soak, control)
    assert_reported(soak, refreshes=steps // 2)
    assert_nothing_grows(soak.gauges, after=300 if steps == 600 else 500)


@pytest.mark.nightly
def test_projecting(tmp_path, monkeypatch):
    control = Soak(tmp_path / "control", monkeypatch, steps=4, every=2, guarded=False)
    soak = Soak(tmp_path / "guarded", monkeypatch, steps=600, every=25, guarded=True, **PROJECT)
    monkeypatch.undo()
    shown(control, soak)
    assert_nothing_is_left(soak, control)
    assert_reported(soak, refreshes=300)
    assert_nothing_grows(soak.gauges, after=300)
    assert max(event["mitigated"] for event in soak.run.of("steps")) > 0, "no step was projected"
    assert all(math.isfinite(row["loss"]) for row in soak.run.trainer.state.log_history if "loss" in row)


def shown(*soaks):
    """Print the gauges, for `pytest -s`."""
    for soak in soaks:
        print("guarded" if soak.faults else "control", {n: (v[0], v[-1]) for n, v in soak.gauges.readings.items()})
