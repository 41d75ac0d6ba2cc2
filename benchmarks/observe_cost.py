"""What observing costs a GRPO run: the time of a refresh beside the time of the steps around it, in one run.

    python -m benchmarks.observe_cost [--steps 40] [--threads 1]

The interference task's model (648k parameters, 512 completions a step) with the guard at its defaults (64 prompts x 16
samples every 5 steps), then with the training batch as probe. Each line is the median over the run; "run time" is
guarded over unguarded: (5 steps + 1 refresh) / 5 steps.
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


def measure(model_dir: Path, source: str, steps: int) -> tuple[float, float, int]:
    """Median seconds of a step without a refresh, median seconds of a refresh, and refreshes."""
    config = GuardConfig(k=8, source=source)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(model_dir, folder, steps=steps, report_to=[], learning_rate=0.0, disable_tqdm=True)
        trainer.remove_callback(PrinterCallback)
        clock = Clock()
        trainer.add_callback(clock)
        probe = make_prompts("probe", 2048, seed=0) if source == "held_out" else None
        trainer.add_callback(PassKGuardCallback(trainer, probe=probe, correct=correct, config=config))
        with PassKObjective(trainer, k=8):
            trainer.train()
        spent = [row["passk_guard/probe_seconds"] for row in trainer.state.log_history if "passk_guard/cosine" in row]
    every = config.refresh_steps
    plain = [seconds for step, seconds in enumerate(clock.seconds) if step % every and step > 0]
    return statistics.median(plain), statistics.median(spent[1:]), len(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("runs/warm_start"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model_dir = warm_start(arguments.cache, 0)
    print(f"{'probe':16} {'step, s':>8} {'refresh, s':>11} {'refresh/step':>13} {'run time':>9}")
    for source in ("held_out", "training_batch"):
        step, refresh, _ = measure(model_dir, source, arguments.steps)
        print(f"{source:16} {step:8.2f} {refresh:11.2f} {refresh / step:13.2f} {1 + refresh / (5 * step):8.2f}x")


if __name__ == "__main__":
    main()
