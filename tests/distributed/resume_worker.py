"""Runs on two processes, whole and killed: `python -m tests.distributed.resume_worker ENGINE FOLDER`.

Started as one process, it imports everything once and forks two ranks for each attempt. The results of all modes are in
FOLDER/found.pt.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from tests.helpers.killing import PLACES, UNGUARDED, attempt, draws, killed_and_resumed
from tests.helpers.resume_cases import MODES, STEPS, events, raw_lines, ready, run

RANKS = 2
CASES = {"unguarded": 1, "observe": 1, "both": 2, "batch_reweight": 1}
"""How often each mode is killed."""


def both_runs(engine, mode, folder):
    """A run that nothing interrupts and one that is killed again and again, rank by rank."""
    train = partial(run, "grpo", engine, mode)
    whole = attempt(train, folder / "whole", RANKS)
    places = UNGUARDED if MODES[mode] is None else PLACES
    seed = f"{engine}/{mode}"
    kills = draws(seed, CASES[mode], STEPS, places, RANKS)
    cut, begins = killed_and_resumed(train, folder / "cut", RANKS, kills, STEPS)
    heard = {} if MODES[mode] is None else {name: events(folder / name) for name in ("whole", "cut")}
    lines = [] if MODES[mode] is None else raw_lines(folder / "cut")
    return {"whole": whole, "cut": cut, "begins": begins, "events": heard, "lines": len(lines)}


if __name__ == "__main__":
    target = Path(sys.argv[2])
    modes = sys.argv[3:] or list(CASES)
    ready(sys.argv[1])
    torch.save({mode: both_runs(sys.argv[1], mode, target / mode) for mode in modes}, target / "found.pt")
