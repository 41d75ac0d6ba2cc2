"""What observing costs a GRPO run: the time of a refresh beside the time of the steps around it, in one run.

    python -m benchmarks.observe_cost [--steps 40] [--threads 1]

The interference task's model (648k parameters, 512 completions a step) with the guard at its defaults (64 prompts x 16
samples every 5 steps), with one draw for 3 and for 5 refreshes, then with the training batch as probe. Steps are
medians over the run, refreshes means of the medians of those that sample and those that do not; "run time" is guarded
over unguarded: (5 steps + 1 refresh) / 5 steps. The learning rate is 0, so that no draw ends early.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback

from examples.interference.task import correct, make_prompts
from examples.interference.train import build_trainer
from examples.interference.warm_start import warm_start
from passk_guard import GuardConfig, PassKGuardCallback, PassKObjective


class Clock(TrainerCallback):
    """Seconds of each step, from its beginning to its end, refresh included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **_):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.seconds.append(time.perf_counter() - self.began)


def measure(model_dir: Path, source: str, steps: int, draws: int) -> tuple[float, float, float]:
    """Median seconds of a step without a refresh, of a refresh that samples, and of one that does not (or the same)."""
    config = GuardConfig(k=8, source=source, resample_refreshes=draws)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(model_dir, folder, steps=steps, report_to=[], learning_rate=0.0, disable_tqdm=True)
        trainer.remove_callback(PrinterCallback)
        clock = Clock()
        trainer.add_callback(clock)
        probe = make_prompts("probe", 2048, seed=0) if source == "held_out" else None
        trainer.add_callback(PassKGuardCallback(trainer, probe=probe, correct=correct, config=config))
        with PassKObjective(trainer, k=8):
            trainer.train()
        rows = [row for row in trainer.state.log_history if "passk_guard/probe_seconds" in row][1:]
    spent: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        spent["passk_guard/pass_at_1" in row].append(row["passk_guard/probe_seconds"])
    sampled = statistics.median(spent[True] or spent[False])
    every = config.refresh_steps
    plain = [seconds for step, seconds in enumerate(clock.seconds) if step % every and step > 0]
    return statistics.median(plain), sampled, statistics.median(spent[False] or spent[True])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("runs/warm_start"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model_dir = warm_start(arguments.cache, 0)
    print(f"{'probe':16} {'draw for':>9} {'step, s':>8} {'refresh, s':>11} {'refresh/step':>13} {'run time':>9}")
    for source, draws in (("held_out", 1), ("held_out", 3), ("held_out", 5), ("training_batch", 1)):
        step, sampled, reused = measure(model_dir, source, arguments.steps, draws)
        refresh = (sampled + (draws - 1) * reused) / draws
        cost = f"{refresh:11.2f} {refresh / step:13.2f} {1 + refresh / (5 * step):8.2f}x"
        print(f"{source:16} {draws:9d} {step:8.2f} {cost}  (sampling anew {sampled:.2f} s, again {reused:.2f} s)")


if __name__ == "__main__":
    main()
