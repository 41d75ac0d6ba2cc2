"""What observing costs a GRPO run: the time of a refresh beside the time of the steps around it, in one run.

    python -m benchmarks.observe_cost [--only short long longer] [--steps 40] [--long-steps 31] [--threads 1]
    python -m benchmarks.observe_cost --only instruments [--rounds 5]

The interference task's model (648k parameters) with the guard at its defaults (64 prompts x 16 samples every 5 steps),
with one draw for 3 and for 5 refreshes, then with the training batch as probe, in three settings: "short", the task
itself, 512 completions of 5 tokens a step; "long", 256 completions of 64 tokens, of random weights and judged by their
digits; and "longer", 32 of 512, where sampling takes most of the step as it does in practice (the training batch alone:
64 x 16 such completions would be 32 training batches). Steps are medians over the run, refreshes
means over a draw of the medians of those that sample and those that do not; "run time" is guarded over unguarded:
(5 steps + 1 refresh) / 5 steps. The learning rate is 0, so that no draw ends early. "floor" is the same with one
forward and backward with frozen weights in place of the refresh, over the share of samples that have a gradient: no
sketch that goes through a model can take less. Where the probe is held out, sampling comes on top of that floor.

"instruments" trains the task with none of the guard's instruments, with the change, with the angle and with both, at a
learning rate of 0.02: ten steps and two refreshes of each, in turn, a round. A ratio is that of one round; printed are
the medians over rounds and the smallest and largest, by the clock and by processor time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from benchmarks.sketch_speed import plain
from examples.interference.model import make_model
from examples.interference.task import correct, make_prompts
from examples.interference.tokenizer import make_tokenizer
from examples.interference.train import build_trainer
from examples.interference.warm_start import warm_start
from passk_guard import GuardConfig, PassKGuardCallback, PassKObjective

PROMPT_TOKENS = 7
EVERY = 5
FIXED: dict[str, Any] = {"probe_prompts": 64, "refresh_steps": EVERY}
PROBES = (("held_out", 1), ("held_out", 3), ("held_out", 5), ("training_batch", 1))
"""Where the probe comes from, and refreshes that a draw serves."""


@dataclass(frozen=True)
class Seconds:
    """Medians of one run: a step without a refresh, a refresh that samples, one that does not (or the same), and the
    pass that no refresh can do without."""

    step: float
    sampled: float
    reused: float
    floor: float


@dataclass(frozen=True)
class Setting:
    """One kind of run: its name, its reward function, tokens of a completion, completions a step, GRPOConfig fields."""

    name: str
    correct: Callable[..., list[float]]
    tokens: int
    completions: int
    overrides: dict[str, Any]


def more_even_digits(completions: list[str], **_: object) -> list[float]:
    """1.0 where more of the digits are even than odd: a model with random weights is right on some samples."""
    parities = ([int(sign) % 2 for sign in text if sign.isdigit()] for text in completions)
    return [float(2 * sum(odd) < len(odd)) for odd in parities]


SHORT = Setting("short", correct, 5, 512, {})
LONG = Setting(
    "long",
    more_even_digits,
    64,
    256,
    {
        "per_device_train_batch_size": 256,
        "max_completion_length": 64,
        "generation_kwargs": {"min_new_tokens": 64},  # random weights would end a completion after some 30
    },
)
LONGER = Setting(
    "longer",
    more_even_digits,
    512,
    32,
    {
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "max_completion_length": 512,
        "generation_kwargs": {"min_new_tokens": 512},
    },
)


class Clock(TrainerCallback):
    """Seconds of each step, from its beginning to its end, refresh included; time and processor time when it began."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began: list[tuple[float, float]] = []

    def on_step_begin(self, args, state, control, **_):
        self.began.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, args, state, control, **_):
        self.seconds.append(time.perf_counter() - self.began[-1][0])


def trained(
    model_dir: Path, config: GuardConfig | None, steps: int, setting: Setting = SHORT, learning_rate: float = 0.0
) -> tuple[Any, PassKGuardCallback | None, Clock]:
    """The trainer after its run, its guard (None without `config`), and the clock that both stood under."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            model_dir,
            folder,
            steps=steps,
            report_to=[],
            learning_rate=learning_rate,
            disable_tqdm=True,
            **setting.overrides,
        )
        trainer.reward_funcs[0] = setting.correct
        trainer.remove_callback(PrinterCallback)
        clock, guard = Clock(), None
        trainer.add_callback(clock)
        if config is not None:
            probe = make_prompts("probe", 2048, seed=0) if config.source == "held_out" else None
            guard = PassKGuardCallback(trainer, probe=probe, correct=setting.correct, config=config)
            trainer.add_callback(guard)
        with PassKObjective(trainer, k=8):
            trainer.train()
    return trainer, guard, clock


INSTRUMENTS = ("change", "angle", "both")


def instrument_ratios(model_dir: Path, rounds: int, periods: int = 2) -> dict[str, list[tuple[float, float]]]:
    """Of each round, the run time with each of `INSTRUMENTS` over that with none: by the clock, and of the processor.

    Steps 5 to 15 count: the first refresh of a run closes no window.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in INSTRUMENTS}
    for _ in range(rounds):
        spent = {}
        for name in (None, *INSTRUMENTS):
            config = None if name is None else GuardConfig(k=8, instruments=name, **FIXED)
            clock = trained(model_dir, config, 5 * (periods + 1) + 1, learning_rate=0.02)[2]
            spent[name] = [b - a for a, b in zip(clock.began[5], clock.began[-1], strict=True)]
        for name in INSTRUMENTS:
            wall, processor = (a / b for a, b in zip(spent[name], spent[None], strict=True))
            found[name].append((wall, processor))
    return found


def measure(model_dir: Path, source: str, draws: int, steps: int, setting: Setting = SHORT) -> Seconds:
    """One guarded run, each draw of the probe serving `draws` refreshes."""
    config = GuardConfig(k=8, source=source, resample_refreshes=draws, **FIXED)
    trainer, guard, clock = trained(model_dir, config, steps, setting)
    assert guard is not None
    rows = [row for row in trainer.state.log_history if "passk_guard/probe_seconds" in row][1:]
    spent: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        spent["passk_guard/pass_at_1" in row].append(row["passk_guard/probe_seconds"])
    unguarded = [seconds for step, seconds in enumerate(clock.seconds) if step % EVERY and step > 0]
    return Seconds(
        step=statistics.median(unguarded),
        sampled=statistics.median(spent[True]),
        reused=statistics.median(spent[False] or spent[True]),
        floor=frozen_pass(trainer.model, setting, guard, source),
    )


def frozen_pass(model: Any, setting: Setting, guard: PassKGuardCallback, source: str) -> float:
    """Seconds of one forward and backward with frozen weights over as many samples as have a gradient."""
    samples = guard.config.probe_prompts * guard.config.num_samples if source == "held_out" else setting.completions
    assert guard.estimate is not None
    kept = max(1, round(samples * guard.estimate.num_informative / guard.estimate.num_prompts))
    width = PROMPT_TOKENS + setting.tokens
    ids = torch.randint(2, model.config.vocab_size, (kept, width), generator=torch.Generator().manual_seed(0))
    completion = (torch.arange(width) >= PROMPT_TOKENS).long().expand(kept, width)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    rows = max(1, guard.memory.pass_tokens // width)
    parts = [{n: t[first : first + rows] for n, t in batch.items()} for first in range(0, kept, rows)]
    seconds = []
    for _ in range(6):
        began = time.perf_counter()  # the clock on the wall, as for steps and refreshes
        for part in parts:
            plain(model, part, "frozen")
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def random_model(folder: Path, **shape: int) -> Path:
    """The same model with random weights and room for the long completions, saved with its tokenizer.

    Args:
        shape: of `make_model`, where it is to be another.
    """
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=0, positions=2048, **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = ("short", "long", "longer")
    parser.add_argument("--only", nargs="+", choices=(*settings, "instruments"), default=settings)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--long-steps", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("runs/warm_start"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if "instruments" in arguments.only:
        print("| instruments | run time | by processor time |\n|---|---|---|")
        for name, ratios in instrument_ratios(warm_start(arguments.cache, 0), arguments.rounds).items():
            columns = (f"{statistics.median(r):.2f}x ({min(r):.2f} to {max(r):.2f})" for r in zip(*ratios, strict=True))
            print(f"| {name} | {' | '.join(columns)} |", flush=True)
        if len(arguments.only) == 1:
            return
    print(f"{'setting':8} {'probe':14} {'draw for':>8} {'step, s':>8} {'refresh, s':>10} {'run time':>9} {'floor':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for setting in (each for each in (SHORT, LONG, LONGER) if each.name in arguments.only):
            steps = arguments.steps if setting is SHORT else arguments.long_steps
            model_dir = warm_start(arguments.cache, 0) if setting is SHORT else random_model(Path(folder))
            for source, draws in PROBES[-1:] if setting is LONGER else PROBES:
                found = measure(model_dir, source, draws, steps, setting)
                refresh = (found.sampled + (draws - 1) * found.reused) / draws
                print(
                    f"{setting.name:8} {source:14} {draws:8d} {found.step:8.2f} {refresh:10.2f} "
                    f"{1 + refresh / (5 * found.step):8.2f}x {1 + found.floor / (5 * found.step):5.2f}x"
                    f"  (sampling anew {found.sampled:.2f} s, again {found.reused:.2f} s)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
