"""Is the realised change what the updates did? Bias, coverage and gain where exact pass rates are known.

    python -m benchmarks.change [--seeds 40 41 ...] [--optimizers sgd adamw] [--report]

The interference task, GRPO on pass@8, 60 steps. Every 5 steps 64 new prompts are sampled 16 times, and the same
completions are scored again 1, 2, 5 and 10 steps later: windows of four lengths from one run. The truth is the exact
change of pass@1 and pass@8 over 4,096 held-out prompts. Beside it stands the difference of two fresh samples. Results
are JSON lines, one a window or refresh; what a file holds is not measured again. Two minutes of a core for each run.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from benchmarks.calibration_file import Measurement, Record, read, take_missing
from examples.interference.exact import success_probability
from examples.interference.task import correct, make_prompts
from examples.interference.train import train
from examples.interference.warm_start import warm_start
from passk_guard.change import ChangeSums, Fused, estimate_change, estimate_level
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.probe.prompts import HeldOut, ProbeSet
from passk_guard.probe.records import padding_token
from passk_guard.probe.rescoring import Rescorer, Window
from passk_guard.probe.samplers import TRLSampler
from passk_guard.probe.verifier import Verifier
from passk_guard.utils.isolation import seeded, untouched
from passk_guard.utils.ranks import Ranks

K, STEPS, EVERY, PROMPTS, SAMPLES = 8, 60, 5, 64, 16
LENGTHS = (1, 2, 5, 10)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"learning_rate": 0.02},
    "adamw": {"optim": "adamw_torch", "learning_rate": 5e-5},
}


class Windows(TrainerCallback):
    """Opens a window every `EVERY` steps, looks at each after `LENGTHS` steps, and sums up those of `EVERY` steps."""

    def __init__(self, trainer: Any, seed: int) -> None:
        self.trainer, self.records = trainer, list[Record]()
        rows = make_prompts("probe", 4096, seed=seed)
        self._rows = rows
        self._source = HeldOut(ProbeSet.from_list(rows), TRLSampler(trainer), PROMPTS, SAMPLES, seed)
        self._verifier = Verifier(correct)
        self._open: list[Window] = []
        self._sums, self._fused = ChangeSums(), Fused()
        self._exact: dict[int, tuple[float, float]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._look(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._look(state.global_step)

    def _look(self, step: int) -> None:
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        ranks = Ranks(trainer.accelerator.device)
        rescorer = Rescorer(model, ranks, 16384, padding_token(trainer.processing_class))
        due = [window for window in self._open if step - window.step in LENGTHS]
        if not due and step % EVERY:
            return
        with untouched(model, trainer.processing_class), seeded(step):
            self._exact[step] = self._rates(model)
            for window in due:
                self._close(window, step, rescorer.log_ratios(window))
            if step % EVERY == 0 and step < STEPS:
                rollouts = self._source.rollouts(step, 0, 1)
                outcomes = self._verifier.score(rollouts, trainer_state=trainer.state)
                window = rescorer.open(rollouts, outcomes, self._source.keys(step), step)
                self._open = [*self._open[-2:], window]
                level = estimate_level(window.correct, K)
                self._fused = self._fused.with_level(level)
                self.records.append({"what": "level", "step": step, "level": level.level_1, "level_k": level.level_k})

    def _close(self, window: Window, step: int, log_ratios: Tensor) -> None:
        found = estimate_change(log_ratios, window.correct, K)
        exact = [now - then for now, then in zip(self._exact[step], self._exact[window.step], strict=True)]
        self.records.append(
            {"what": "window", "step": window.step, "length": step - window.step}
            | {"change": found.pass_at_1, "se": found.pass_at_1_se, "degrees": found.degrees, "exact": exact[0]}
            | {"change_k": found.pass_at_k, "se_k": found.pass_at_k_se, "degrees_k": found.degrees_k}
            | {"exact_k": exact[1], "effective_samples": found.effective_samples}
        )
        if step - window.step == EVERY:
            self._sums, self._fused = self._sums.with_window(found), self._fused.with_window(found)
            total, fused = self._sums.change(0.95).pass_at_1, self._fused.pass_at_1
            since = self._exact[step][0] - self._exact[0][0]
            self.records.append(
                {"what": "total", "step": step, "exact": since, "total": total.total, "se": total.se}
                | {"low": total.ci_low, "high": total.ci_high, "seq_low": total.seq_low, "seq_high": total.seq_high}
                | {"fused": fused.change, "fused_se": fused.change_se}
            )

    @torch.no_grad()
    def _rates(self, model: Any) -> tuple[float, float]:
        p = torch.cat(
            [
                success_probability(model, self.trainer.processing_class, self._rows[i : i + 512])
                for i in range(0, 4096, 512)
            ]
        ).double()
        return float(p.mean()), float((1 - (1 - p) ** K).mean())


def run(optimizer: str, seed: int, cache: Path) -> list[Record]:
    """One training run and everything that was measured along it."""
    kept: list[Windows] = []

    def prepare(trainer: Any) -> None:
        kept.append(Windows(trainer, seed))
        trainer.add_callback(kept[0])
        trainer.remove_callback(PrinterCallback)

    with tempfile.TemporaryDirectory() as folder:
        model = warm_start(cache, seed)
        settings = OPTIMIZERS[optimizer] | {"report_to": [], "disable_tqdm": True}
        train(model, folder, steps=STEPS, k=K, seed=seed, evaluate_every=STEPS, prepare=prepare, **settings)
    return kept[0].records


def plan(optimizers: list[str], seeds: list[int], cache: Path) -> Iterator[Measurement]:
    """One measurement a run."""
    for seed in seeds:
        for optimizer in optimizers:
            asked: Record = {"optimizer": optimizer, "seed": seed}
            yield Measurement(asked, lambda optimizer=optimizer, seed=seed: run(optimizer, seed, cache))


def print_tables(console: Console, records: list[Record]) -> None:
    """What the issue asks of the estimate, in two tables."""
    for rate, suffix in (("pass@1", ""), ("pass@8", "_k")):
        table = Table(title=f"change of {rate} over one window, against the exact change of 4,096 prompts")
        for heading in (
            "optimizer",
            "steps",
            "windows",
            "bias / its error",
            "95% covers",
            "rms error",
            "two samples",
            "ratio",
        ):
            table.add_column(heading, justify="right")
        for optimizer, length in [(o, n) for o in OPTIMIZERS for n in LENGTHS]:
            rows = [
                r for r in records if r["what"] == "window" and r["optimizer"] == optimizer and r["length"] == length
            ]
            if rows:
                table.add_row(optimizer, str(length), str(len(rows)), *_window_columns(rows, records, suffix))
        console.print(table)
    table = Table(title="change of pass@1 since the start, at all refreshes")
    for heading in (
        "optimizer",
        "runs",
        "rms of the sum",
        "rms fused",
        "two samples",
        "95% covers",
        "runs within their sequence",
    ):
        table.add_column(heading, justify="right")
    for optimizer in OPTIMIZERS:
        rows = [r for r in records if r["what"] == "total" and r["optimizer"] == optimizer]
        if not rows:
            continue
        seeds = {r["seed"] for r in rows}
        within = sum(
            all(r["seq_low"] <= r["exact"] <= r["seq_high"] for r in rows if r["seed"] == seed) for seed in seeds
        )
        covered = sum(r["low"] <= r["exact"] <= r["high"] for r in rows) / len(rows)
        table.add_row(
            optimizer,
            str(len(seeds)),
            f"{_rms([r['total'] - r['exact'] for r in rows]):.4f}",
            f"{_rms([r['fused'] - r['exact'] for r in rows]):.4f}",
            f"{_fresh(rows, records, '', since_start=True):.4f}",
            f"{100 * covered:.0f}%",
            f"{within} of {len(seeds)}",
        )
    console.print(table)


def _window_columns(rows: list[Record], records: list[Record], suffix: str) -> list[str]:
    errors = [r["change" + suffix] - r["exact" + suffix] for r in rows]
    bias, spread = sum(errors) / len(errors), _rms(errors) / math.sqrt(len(errors))
    covered = sum(
        abs(error) <= student_t_quantile(0.975, r["degrees" + suffix]) * r["se" + suffix]
        for error, r in zip(errors, rows, strict=True)
    )
    fresh = _fresh(rows, records, suffix)
    return [
        f"{bias:+.4f} / {spread:.4f}",
        f"{100 * covered / len(rows):.0f}%",
        f"{_rms(errors):.4f}",
        f"{fresh:.4f}" if math.isfinite(fresh) else "",
        f"{fresh / _rms(errors):.1f}" if math.isfinite(fresh) else "",
    ]


def _fresh(rows: list[Record], records: list[Record], suffix: str, since_start: bool = False) -> float:
    """Rms error of the difference of two fresh samples over the same steps; infinite where there were none."""
    levels = {(r["optimizer"], r["seed"], r["step"]): r["level" + suffix] for r in records if r["what"] == "level"}
    errors = []
    for r in rows:
        end = r["step"] if since_start else r["step"] + r["length"]
        first, last = (r["optimizer"], r["seed"], 0 if since_start else r["step"]), (r["optimizer"], r["seed"], end)
        if first in levels and last in levels:
            errors.append(levels[last] - levels[first] - r["exact" + suffix])
    return _rms(errors) if errors else math.inf


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(40, 48)))
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/change.jsonl"))
    parser.add_argument("--cache", type=Path, default=Path("runs/warm_start"))
    parser.add_argument("--report", action="store_true", help="print the tables and measure nothing")
    given = parser.parse_args()
    if not given.report:
        take_missing(list(plan(given.optimizers, given.seeds, given.cache)), given.results)
    print_tables(Console(width=150), read(given.results))


if __name__ == "__main__":
    main()
