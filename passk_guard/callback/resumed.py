"""Whose memory a run goes on with: the folder that it was resumed from, and the run that wrote it."""

from __future__ import annotations

import inspect
import json
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint

from passk_guard.callback.state import FILE_NAME, Memory, load_memory
from passk_guard.reporting.journal import JOURNAL_NAME, run_of
from passk_guard.utils.ranks import Ranks


def recall(
    trainer: Any, args: Any, state: Any, ranks: Ranks, warn: Callable[[str], None]
) -> tuple[Memory, Path | None]:
    """The memory to go on with, and the checkpoint folder that it is from: the same run on every rank.

    A run that begins gets an identity, which is in its checkpoints and in its journal. One that is resumed keeps the
    identity of its checkpoint; a checkpoint that names none is taken for one of the journal's run.

    Args:
        warn: told what was dropped, and where checkpoint, journal and output folder are not of one run.

    Returns:
        A memory without a past where there is none or a rank lacks it. The folder is None where a rank has none.
    """
    output = Path(args.output_dir)
    journal = run_of(output / JOURNAL_NAME)
    if state.global_step == 0:
        return Memory(run=_of_first(secrets.token_hex(6), ranks)), None
    folder = resumed_folder(trainer, args, state)
    memory = None if folder is None else load_memory(folder)
    if ranks.max(int(folder is None)):
        folder = None
    run = _of_first("" if memory is None else memory.run, ranks)
    lost = memory is None or memory.run != run  # ranks that do not share a disk would decide differently from here on
    if ranks.max(int(lost)) or memory is None:
        warn("resumed without the guard's memory, starting afresh")
        memory = Memory()
    elif others := _of_another_run(memory.run, folder, output, state.global_step, journal):
        warn(f"resumed from {folder}, whose memory the guard follows; {'; '.join(others)}")
    return replace(memory, run=_of_first(memory.run or journal or secrets.token_hex(6), ranks)), folder


def resumed_folder(trainer: Any, args: Any, state: Any) -> Path | None:
    """The checkpoint folder that this train() goes on from; None where there is none, or it cannot be told.

    A Trainer tells its callbacks no folder. Tried are: what the train() that is running was given (where that is True,
    the newest checkpoint in `output_dir`), `args.resume_from_checkpoint`, and this step's folder in `output_dir`. The
    first is right where its `trainer_state.json` is of this step. The others were not named, and must hold the loaded
    state's log rows too.
    """
    given = _given(trainer)
    if given is True:
        given = get_last_checkpoint(args.output_dir)
    if isinstance(given, str) and _is_of(Path(given), state, rows=False):
        return Path(given)
    others = [args.resume_from_checkpoint, Path(args.output_dir) / f"checkpoint-{state.global_step}"]
    return next((Path(x) for x in others if x is not None and _is_of(Path(x), state, rows=True)), None)


def _given(trainer: Any) -> str | bool | None:
    """The `resume_from_checkpoint` of the innermost call of the trainer's that has this argument.

    A subclass may choose the folder itself and hand it on, so that the argument of the outer call says nothing.
    """
    frame = inspect.currentframe()
    try:
        while frame is not None:
            code = frame.f_code
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if "resume_from_checkpoint" in names and frame.f_locals.get(names[0]) is trainer:
                found = frame.f_locals["resume_from_checkpoint"]
                return found if isinstance(found, bool) or found is None else str(found)
            frame = frame.f_back
        return None
    finally:
        del frame  # or a cycle keeps the locals of all callers until the collector comes


def _is_of(folder: Path, state: Any, *, rows: bool) -> bool:
    """Whether the state in this folder is of this step and, where asked for, has the same log rows."""
    try:
        saved = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        past = saved["log_history"] if rows else []
        same = json.dumps(past, sort_keys=True) == json.dumps(state.log_history[: len(past)], sort_keys=True)
        return bool(saved["global_step"] == state.global_step and same)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _of_another_run(run: str, folder: Path | None, output: Path, step: int, journal: str | None) -> list[str]:
    """What in the output folder is not of this run, as clauses."""
    found = []
    beside = output / f"checkpoint-{step}"
    if folder is not None and (beside / FILE_NAME).is_file() and not beside.samefile(folder):
        other = load_memory(beside)
        if other is None or not run or other.run != run:
            found.append(f"the memory in {beside} is not taken, as it may be of another run")
    if run and journal and journal != run:
        name = output / JOURNAL_NAME
        found.append(f"the events in {name} are left out of its report, as they are of another run")
    return found


def _of_first(run: str, ranks: Ranks) -> str:
    """The first rank's identity of the run, on every rank."""
    number = int(ranks.from_first(torch.tensor([int(f"1{run}", 16)])))
    return f"{number:x}"[1:]
