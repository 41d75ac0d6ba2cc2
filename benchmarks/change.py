"""Is the realised change what the updates did? Bias, coverage and gain where exact pass rates are known.

    python -m benchmarks.change [--seeds 40 41 ...] [--starts 0 40 ...] [--optimizers sgd adamw] [--report]

The interference task, GRPO on pass@8, 40 steps of 16 prompts x 16. Every 5 steps 64 of 1,024 held-out prompts are
sampled 16 times, chosen anew each time, and the same completions are scored again 1, 2, 5 and 10 steps later: windows
of four lengths from one run. The truth is the exact change of pass@1 and pass@8 over the 1,024 prompts. Beside it stand
two samples with prompts of their own, and two of the same prompts; the second sample is drawn from the exact pass
rates. A window's interval is that of a larger population, and so 3% too long at most.

Results are JSON lines, one a window or refresh; what a file holds is not measured again. A run takes a minute or two of
a core, and a warm start two: `--starts` takes turns with those that there are.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN
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
from passk_guard.passk.closed_forms import pass_at_k
from passk_guard.probe.prompts import HeldOut, ProbeSet
from passk_guard.probe.records import padding_token
from passk_guard.probe.rescoring import Rescorer, Window
from passk_guard.probe.samplers import TRLSampler
from passk_guard.probe.verifier import Verifier
from passk_guard.utils.isolation import seeded, untouched
from passk_guard.utils.ranks import Ranks

K, STEPS, EVERY, PROMPTS, SAMPLES, POPULATION = 8, 40, 5, 64, 16, 1024
LENGTHS = (1, 2, 5, 10)
BATCH = 256
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"learning_rate": 0.02},
    "adamw": {"optim": "adamw_torch", "learning_rate": 5e-5},
}


class Windows(TrainerCallback):
    """Opens a window every `EVERY` steps, closes each after all of `LENGTHS`, and sums up those of `EVERY` steps."""

    def __init__(self, trainer: Any, seed: int) -> None:
        self.trainer, self.seed, self.records = trainer, seed, list[Record]()
        self._rows = make_prompts("probe", POPULATION, seed=seed)
        self._probe, self._sampler = ProbeSet.from_list(self._rows), TRLSampler(trainer)
        self._verifier = Verifier(correct)
        self._open: list[tuple[Window, Tensor]] = []
        self._sums, self._fused = ChangeSums(), Fused()
        self._exact: dict[int, Tensor] = {}
        self._level_at_start = math.nan

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._check(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._check(state.global_step)

    def _check(self, step: int) -> None:
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        rescorer = Rescorer(model, Ranks(trainer.accelerator.device), 16384, padding_token(trainer.processing_class))
        due = [found for found in self._open if step - found[0].step in LENGTHS]
        if not due and step % EVERY:
            return
        with untouched(model, trainer.processing_class), seeded(1000 * self.seed + step):
            self._exact[step] = exact_rates(model, trainer.processing_class, self._rows)
            for window, chosen in due:
                self._close(window, chosen, step, rescorer.log_ratios(window))
            if step % EVERY == 0 and step < STEPS:
                self._sample(step, rescorer)

    def _sample(self, step: int, rescorer: Rescorer) -> None:
        seed = 1000 * self.seed + step  # prompts chosen independently of those before
        source = HeldOut(self._probe, self._sampler, PROMPTS, SAMPLES, seed)
        rollouts = source.rollouts(0, 0, 1)
        outcomes = self._verifier.score(rollouts, trainer_state=self.trainer.state)
        window = rescorer.open(rollouts, outcomes, source.keys(0), step)
        chosen = torch.tensor(list(self._probe.draw(0, PROMPTS, seed)))
        self._open = [*self._open[-2:], (window, chosen)]
        level = estimate_level(window.correct, K)
        self._fused = self._fused.with_level(level)
        if step == 0:
            self._level_at_start = level.level_1

    def _close(self, window: Window, chosen: Tensor, step: int, log_ratios: Tensor) -> None:
        found = estimate_change(log_ratios, window.correct, K)
        then, now = self._exact[window.step], self._exact[step]
        new = sampled_rates(now[torch.randperm(POPULATION)[:PROMPTS]])
        again = sampled_rates(now[chosen])
        self.records.append(
            {"what": "window", "step": window.step, "length": step - window.step}
            | {"change": found.pass_at_1, "se": found.pass_at_1_se, "degrees": found.degrees}
            | {"exact": passed(now, 1) - passed(then, 1)}
            | {"fresh": new[0] - found.level.level_1, "again": again[0] - found.level.level_1}
            | {"change_k": found.pass_at_k, "se_k": found.pass_at_k_se, "degrees_k": found.degrees_k}
            | {"exact_k": passed(now, K) - passed(then, K)}
            | {"fresh_k": new[1] - found.level.level_k, "again_k": again[1] - found.level.level_k}
            | {"effective_samples": found.effective_samples}
        )
        if step - window.step == EVERY:
            self._sums, self._fused = self._sums.with_window(found), self._fused.with_window(found)
            total, fused = self._sums.change(0.95).pass_at_1, self._fused.pass_at_1
            self.records.append(
                {"what": "total", "step": step, "exact": passed(now, 1) - passed(self._exact[0], 1)}
                | {"total": total.total, "se": total.se, "low": total.ci_low, "high": total.ci_high}
                | {"seq_low": total.seq_low, "seq_high": total.seq_high}
                | {"fused": fused.change, "fused_se": fused.change_se, "fresh": new[0] - self._level_at_start}
            )


@torch.no_grad()
def exact_rates(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> Tensor:
    """[len(rows)] float64 chance that one completion of each prompt is right."""
    parts = [success_probability(model, tokenizer, rows[i : i + 128]) for i in range(0, len(rows), 128)]
    return torch.cat(parts).double().clamp(0, 1)


def passed(rates: Tensor, k: int) -> float:
    """Exact pass@k over prompts of these pass rates."""
    return float((1 - (1 - rates) ** k).mean())


def sampled_rates(rates: Tensor) -> tuple[float, float]:
    """pass@1 and pass@k of a sample of `SAMPLES` completions a prompt, whose pass rates are known."""
    size = torch.full_like(rates, SAMPLES)
    right = torch.binomial(size, rates).long()
    return float((right / SAMPLES).mean()), float(pass_at_k(size.long(), right, K).mean())


def run(optimizer: str, seed: int, start: int, cache: Path) -> list[Record]:
    """One training run and everything that was measured along it."""
    kept: list[Windows] = []

    def prepare(trainer: Any) -> None:
        kept.append(Windows(trainer, seed))
        trainer.add_callback(kept[0])
        trainer.remove_callback(PrinterCallback)

    with tempfile.TemporaryDirectory() as folder:
        settings = OPTIMIZERS[optimizer] | {"report_to": [], "disable_tqdm": True, "per_device_train_batch_size": BATCH}
        model = warm_start(cache, start)
        train(model, folder, steps=STEPS, k=K, seed=seed, evaluate_every=STEPS, prepare=prepare, **settings)
    return [{"start": start} | record for record in kept[0].records]


def plan(optimizers: list[str], seeds: list[int], starts: list[int] | None, cache: Path) -> Iterator[Measurement]:
    """One measurement a run; each seed has a warm start of its own where no `starts` are given."""
    for i, seed in enumerate(seeds):
        start = starts[i % len(starts)] if starts else seed
        for optimizer in optimizers:
            asked: Record = {"optimizer": optimizer, "seed": seed}
            yield Measurement(
                asked, lambda optimizer=optimizer, seed=seed, start=start: run(optimizer, seed, start, cache)
            )


def window_figures(rows: Sequence[Record], suffix: str = "") -> dict[str, float]:
    """What the windows in these records show, for pass@1, or for pass@k with the suffix `_k`.

    Returns:
        windows, bias with its standard error (windows of one sample err together), share of 95% intervals that hold
        the truth, and the rms errors of the estimate, of two samples of different prompts and of two of the same.
    """
    errors = [r["change" + suffix] - r["exact" + suffix] for r in rows]
    covered = [
        abs(error) <= student_t_quantile(0.975, r["degrees" + suffix]) * r["se" + suffix]
        for error, r in zip(errors, rows, strict=True)
    ]
    together: dict[tuple[str, int, int], float] = {}
    for error, r in zip(errors, rows, strict=True):
        sample = (r["optimizer"], r["seed"], r["step"])
        together[sample] = together.get(sample, 0.0) + error
    return {
        "windows": len(rows),
        "bias": sum(errors) / len(errors),
        "bias_se": math.sqrt(sum(error**2 for error in together.values())) / len(errors),
        "covered": sum(covered) / len(covered),
        "rms": _rms(errors),
        "fresh": _rms([r["fresh" + suffix] - r["exact" + suffix] for r in rows]),
        "again": _rms([r["again" + suffix] - r["exact" + suffix] for r in rows]),
    }


def total_figures(rows: Sequence[Record]) -> dict[str, float]:
    """What the totals since the start show.

    Returns:
        runs, those of them whose exact total was within its sequence at every refresh, the share of single intervals
        that hold it, and the rms errors of the sum, of the fused curve and of two samples.
    """
    runs = {(r["optimizer"], r["seed"]): True for r in rows}
    for r in rows:
        runs[r["optimizer"], r["seed"]] &= r["seq_low"] <= r["exact"] <= r["seq_high"]
    return {
        "runs": len(runs),
        "within": sum(runs.values()),
        "covered": sum(r["low"] <= r["exact"] <= r["high"] for r in rows) / len(rows),
        "rms": _rms([r["total"] - r["exact"] for r in rows]),
        "fused": _rms([r["fused"] - r["exact"] for r in rows]),
        "fresh": _rms([r["fresh"] - r["exact"] for r in rows]),
    }


def print_tables(console: Console, records: list[Record]) -> None:
    """Windows of pass@1 and pass@k, and the change since the start."""
    for rate, suffix in (("pass@1", ""), ("pass@8", "_k")):
        table = _table(
            f"change of {rate} over one window; errors are root mean squares",
            ("optimizer", "steps", "windows", "bias", "95% covers", "error", "two samples", "same prompts", "ratios"),
        )
        windows = [r for r in records if r["what"] == "window"]
        for optimizer, length in [*((o, n) for o in OPTIMIZERS for n in LENGTHS), ("both", None)]:
            rows = [r for r in windows if length is None or (r["optimizer"], r["length"]) == (optimizer, length)]
            if rows:
                f = window_figures(rows, suffix)
                table.add_row(
                    *(optimizer, str(length or "all"), str(f["windows"]), f"{f['bias']:+.4f} +- {f['bias_se']:.4f}"),
                    *(f"{100 * f['covered']:.0f}%", f"{f['rms']:.4f}", f"{f['fresh']:.4f}", f"{f['again']:.4f}"),
                    f"{f['fresh'] / f['rms']:.1f}, {f['again'] / f['rms']:.1f}",
                )
        console.print(table)
    table = _table(
        "change of pass@1 since the start, at all refreshes",
        ("optimizer", "runs", "error of the sum", "fused", "two samples", "95% covers", "within the sequence"),
    )
    for optimizer in OPTIMIZERS:
        rows = [r for r in records if r["what"] == "total" and r["optimizer"] == optimizer]
        if rows:
            f = total_figures(rows)
            table.add_row(
                *(optimizer, str(f["runs"]), f"{f['rms']:.4f}", f"{f['fused']:.4f}", f"{f['fresh']:.4f}"),
                *(f"{100 * f['covered']:.0f}%", f"{f['within']} of {f['runs']}"),
            )
    console.print(table)


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, box=MARKDOWN)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(40, 48)))
    parser.add_argument("--starts", type=int, nargs="+", help="seeds of warm starts, in turn; default each its own")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/change.jsonl"))
    parser.add_argument("--cache", type=Path, default=Path("runs/warm_start"))
    parser.add_argument("--report", action="store_true", help="print the tables and measure nothing")
    given = parser.parse_args()
    if not given.report:
        take_missing(list(plan(given.optimizers, given.seeds, given.starts, given.cache)), given.results)
    print_tables(Console(width=130), read(given.results))


if __name__ == "__main__":
    main()
