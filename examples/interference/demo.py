"""The demo: GRPO on pass@8 loses pass@1, the guard says so before most of it is lost, and a guarded run keeps it.

    python -m examples.interference.demo [--seeds 0 1 2] [--out runs/demo]
    passk-guard demo                            # the same without a checkout: the wheel has this folder's files

Each seed has its own warm start and its own prompts. Two runs start from it: in `observe` the guard changes nothing, in
`project` it turns each gradient before the optimizer step. In the folder of the seed:

    demo.png                       both runs, and what the observing guard measured, on one time axis
    ARM/results.jsonl              exact pass@1, pass@8 and cosine at each evaluation, and a summary
    ARM/passk_guard.jsonl          what the guard saw, when its verdict changed, what it did
    ARM/tensorboard/               everything that TRL and the guard log

The learning rate is a quarter of `train`'s: at 0.075 pass@1 is lost within five steps, at 0.02 the fall takes
thirty, as in a run that somebody is watching. The exit status is 1 when a run does not show the claim.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOTrainer

from passk_guard import ProbeSet, watch

from . import report
from .task import correct, make_prompts
from .train import train
from .warm_start import warm_start, warm_start_dir

K, STEPS, LEARNING_RATE, EVALUATE_EVERY = 8, 60, 0.02, 2


class ProgressBar(TrainerCallback):
    """One line for the run: pass@1 and pass@k (exact) and the guard's cosine, in place of a line for each step.

    Nothing where standard error, which it is drawn on, is no terminal.
    """

    def __init__(self, arm: str) -> None:
        self.bar = tqdm(total=STEPS, desc=f"GRPO on pass@{K}, {arm}", disable=None)
        self.shown = {}

    def on_log(self, args, state, control, logs=None, **_):
        names = {"pass@1": "exact/pass_at_1", f"pass@{K}": f"exact/pass_at_{K}", "cosine": "passk_guard/cosine"}
        self.shown |= {label: f"{logs[name]:.3f}" for label, name in names.items() if logs.get(name) is not None}
        self.bar.set_postfix(self.shown, refresh=False)

    def on_step_end(self, args, state, control, **_):
        self.bar.update()

    def on_train_end(self, args, state, control, **_):
        self.bar.close()


def attach_guard(trainer: GRPOTrainer, arm: str) -> None:
    """The guard as a user would add it. Observing only, the run is the one it would have been without it."""
    probe = ProbeSet.from_list(make_prompts("probe", 2048, seed=trainer.args.seed))
    settings = {"refresh_steps": 5, "probe_prompts": 64, "mitigation": "project" if arm == "project" else "off"}
    watch(trainer, probe=probe, correct=correct, k=K, **settings)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressBar(arm))


@contextmanager
def tensorboard_folder(folder: Path) -> Iterator[None]:
    """Where transformers writes TensorBoard files inside the context; the environment is its only way in."""
    name = "TENSORBOARD_LOGGING_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def run(arm: str, seed: int, out: Path, model_dir: Path) -> tuple[list[report.Record], list[dict], report.Summary]:
    """One arm of one seed: exact evaluations, the guard's events, and the summary of both."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "passk_guard.jsonl").unlink(missing_ok=True)  # the guard appends, for runs that are resumed
    with tensorboard_folder(out / "tensorboard" / time.strftime("%Y%m%d-%H%M%S")):
        _, records = train(
            model_dir,
            out,
            steps=STEPS,
            k=K,
            seed=seed,
            evaluate_every=EVALUATE_EVERY,
            prepare=lambda trainer: attach_guard(trainer, arm),
            learning_rate=LEARNING_RATE,
            disable_tqdm=True,
        )
    events = report.read_events(out / "passk_guard.jsonl")
    summary = report.summarise(records, events, K)
    report.write_results(out / "results.jsonl", records, summary)
    return records, events, summary


def compare(seed: int, out: Path, cache: Path, console: Console) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Both arms of one seed, with their tables and the figure: their numbers, and what the demo failed to show."""
    model_dir = warm_start(cache, seed)
    records, events, summary = run("observe", seed, out / "observe", model_dir)
    report.print_table(console, f"seed {seed}, {STEPS} steps of GRPO on pass@{K}, observed", records, summary)
    report.print_alarms(console, summary, events)
    guarded, _, guarded_summary = run("project", seed, out / "project", model_dir)
    report.print_table(console, f"seed {seed}, the same with mitigation='project'", guarded, guarded_summary)
    report.draw(out / "demo.png", records, events, K, guarded)
    numbers = {"observe": asdict(summary), "project": asdict(guarded_summary)}
    return numbers, summary.failures() + guarded_summary.guarded_failures()


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog, description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where results are written")
    parser.add_argument("--cache", type=Path, default=Path("runs/warm_start"), help="where warm starts are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--json", action="store_true", help="numbers alone on standard output, for a program")
    args = parser.parse_args(argv)
    # The matrices are tiny: a second thread gains a third at best, and on a busy machine the two wait for each other.
    torch.set_num_threads(args.threads)

    if not sys.stderr.isatty():
        disable_progress_bar()  # of a model being loaded

    console = Console(stderr=args.json)
    todo = sum(not warm_start_dir(args.cache, seed).exists() for seed in args.seeds)
    console.print(
        f"Plan: {todo} warm start(s) of 1-2 minutes (cached in {args.cache}), then for {len(args.seeds)} seed(s) "
        f"{STEPS} GRPO steps on pass@{K} with the guard observing and {STEPS} with it guarding, 1-2 minutes each."
    )
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the stack's own renamed settings
    started, numbers, failures = time.monotonic(), {}, []
    with logging_redirect_tqdm([logging.getLogger("passk_guard")]):
        for seed in args.seeds:
            numbers[seed], missing = compare(seed, args.out / f"seed{seed}", args.cache, console)
            failures += [f"seed {seed}: {reason}" for reason in missing]
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes. Figures, results and TensorBoard: {args.out}")
    arms = " ".join(str(args.out / f"seed{args.seeds[0]}" / arm) for arm in ("observe", "project"))
    command = next((path for path in [".venv/bin/passk-guard"] if Path(path).exists()), "passk-guard")
    console.print(f"Both runs on one page: {command} report {arms}", soft_wrap=True)
    if args.json:
        print(json.dumps({"seeds": numbers, "failures": failures}, indent=2))
    for failure in failures:
        print(f"The demo did not show its claim. {failure}.", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
