"""Whether the budget holds in time: the guard at its defaults in six shapes of GRPO run.

    python -m benchmarks.overhead [--only "32 x 8" ...] [--whole "32 x 8" "2048 x 8"] [--rounds 2]

The budget `overhead` (default 0.10) counts tokens by fixed weights; this measures processor time of one process on one
thread. The model is that of the interference task (648k parameters) with random weights, behind prompts of 7 tokens;
with the longest completions it has one layer of width 64, so that the benchmark ends.
Every completion has its full length, but for "<=", where it ends by itself. A coin decides whether it is right, so that
every prompt counts in the angle: the dearest refresh. The probe has the size that a run of 1,000 steps is given.

A run is too long to measure where completions are long, so steps and refreshes are measured apart: `step` is the median
of steps without a refresh, `refresh` the mean of those that close a window, which the first one does not. `cadence` is
the account's own, steps between two refreshes in the long run, and the run time 1 + refresh / (cadence x step).
`--whole` runs two such periods with the guard at its defaults and without it, in turn: each step takes the least of its
rounds. Given is the run time up to the newest refresh, which the run has not paid yet, and with it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.observe_cost import Setting, random_model, trained
from passk_guard import GuardConfig
from passk_guard.callback.budget import FORWARD, probe_size

RUN = 1000
"""Steps of the run whose probe is measured."""

SMALLER = {"hidden": 64, "layers": 1}
"""Of the model with the longest completions."""

PERIODS = 2
"""Cadences in a whole run."""


def coin(completions: list[str], **_: object) -> list[float]:
    """1.0 for about half of the completions, whatever their length."""
    return [float(zlib.crc32(text.encode()) % 2) for text in completions]


def shape(completions: int, tokens: int, *, ends: bool = False) -> Setting:
    """Of a GRPO run: completions a step, and tokens of each; at most so many where a completion `ends` by itself."""
    overrides: dict[str, Any] = {"per_device_train_batch_size": completions, "max_completion_length": tokens}
    if not ends:
        overrides["generation_kwargs"] = {"min_new_tokens": tokens}
    return Setting(f"{completions} x {'<= ' * ends}{tokens}", coin, tokens, completions, overrides)


_SHORT = [shape(32, 8), shape(256, 32), shape(2048, 8)]
_LONG = [shape(256, 128, ends=True), shape(64, 256), shape(32, 1024)]
SHAPES = {each.name: each for each in [*_SHORT, *_LONG]}


def periods(model_dir: Path, config: GuardConfig | None, steps: int, setting: Setting) -> tuple[Any, Any, list[float]]:
    """Trainer and guard after a run, and the processor seconds of each step with the refresh before it."""
    trainer, guard, clock = trained(model_dir, config, steps + 1, setting)
    return trainer, guard, [after[1] - before[1] for before, after in pairwise(clock.began)]


def measure(model_dir: Path, setting: Setting, refreshes: int) -> tuple[int, float, float, int]:
    """Prompts of a refresh at the defaults, seconds of a step and of a refresh, and the cadence.

    Args:
        refreshes: to measure, one before every other step; one more goes before them.
    """
    config = GuardConfig(k=8)
    size = probe_size(trained(model_dir, None, 1, setting)[0], config, RUN)
    steps = 2 * refreshes + 1
    trainer, guard, seconds = periods(model_dir, replace(config, probe_prompts=size, refresh_steps=2), steps, setting)
    assert guard.memory.failures == 0
    step = statistics.median(seconds[1::2])
    refresh = statistics.mean(seconds[2::2]) - step
    # The account is settled at the end of the run. The first refresh scored its completions once and not twice.
    account = guard.memory.account
    account = replace(account, probe=account.probe + FORWARD * guard._change.tokens)
    cadence = account.cadence(trainer.state.global_step, config.overhead)
    assert cadence is not None
    return size, step, refresh, cadence


def whole(model_dir: Path, setting: Setting, cadence: int, rounds: int) -> str:
    """Run time of `PERIODS` guarded over not: up to the newest refresh, which is not paid yet, and with it."""
    plain, guarded = list[list[float]](), list[list[float]]()
    for _ in range(rounds):
        plain.append(periods(model_dir, None, PERIODS * cadence, setting)[2])
        _, guard, seconds = periods(model_dir, GuardConfig(k=8), PERIODS * cadence, setting)
        guarded.append(seconds)
    without, least = (list(map(min, *parts, parts[0])) for parts in (plain, guarded))
    newest, account = guard.memory.step, guard.memory.account
    paid = sum(least[:newest]) / sum(without[:newest])
    return f"{paid:.3f}x; {sum(least) / sum(without):.3f}x with the newest of {account.refreshes} refreshes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--whole", nargs="*", choices=list(SHAPES), default=["32 x 8", "2048 x 8"])
    parser.add_argument("--refreshes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| completions x tokens | probe | step, s | refresh, s | cadence | run time | whole run |")
    print("|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for setting in (SHAPES[name] for name in arguments.only):
            longest = setting.tokens > 500
            model_dir = random_model(Path(folder), **(SMALLER if longest else {}))
            size, step, refresh, cadence = measure(model_dir, setting, 1 if longest else arguments.refreshes)
            row = f"| {setting.name} | {size} x 16 | {step:.3f} | {refresh:.2f} | {cadence} "
            row += f"| {1 + refresh / (cadence * step):.3f}x | "
            if setting.name in arguments.whole:
                row += f"{whole(model_dir, setting, cadence, arguments.rounds)} "
            print(row + "|", flush=True)


if __name__ == "__main__":
    main()
