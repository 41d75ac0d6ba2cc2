"""Runs on two processes, whole and killed: `python -m tests.distributed.resume_worker ENGINE FOLDER`.

Started as one process: it imports everything once and forks two ranks for each attempt. What each mode came to is left
in FOLDER/found.pt.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import trl.trainer.grpo_trainer  # noqa: F401  before the forks

from tests.killing import PLACES, UNGUARDED, attempt, draws, killed_and_resumed
from tests.resume_cases import MODES, STEPS, events, raw_lines, run

RANKS = 2
CASES = {"unguarded": ("grpo", 2), "observe": ("grpo", 1), "both": ("grpo", 3), "batch_reweight": ("grpo", 2)}
"""Which trainer, and how often it is killed."""


def both_runs(engine, mode, folder):
    """A run that nothing interrupts and one that is killed again and again, rank by rank."""
    kind, kills = CASES[mode]
    train = partial(run, kind, engine, mode)
    whole = attempt(train, folder / "whole", RANKS)
    places = UNGUARDED if MODES[mode] is None else PLACES
    seed = f"{engine}/{mode}"
    cut, begins = killed_and_resumed(train, folder / "cut", RANKS, draws(seed, kills, STEPS, places, RANKS), STEPS)
    said = {} if MODES[mode] is None else {name: events(folder / name) for name in ("whole", "cut")}
    torn = [] if MODES[mode] is None else raw_lines(folder / "cut")
    return {"whole": whole, "cut": cut, "begins": begins, "events": said, "lines": len(torn)}


if __name__ == "__main__":
    target = Path(sys.argv[2])
    modes = sys.argv[3:] or list(CASES)
    torch.save({mode: both_runs(sys.argv[1], mode, target / mode) for mode in modes}, target / "found.pt")
