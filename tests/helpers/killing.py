"""Kill processes (SIGKILL) at random moments of a run, and resume them from the checkpoint before.

Every attempt is a forked child, or one child for each rank. Nothing is imported twice, and only files outlive a child.
"""

import logging
import os
import random
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainerCallback

from passk_guard.callback.state import FILE_NAME
from passk_guard.reporting.journal import JOURNAL_NAME

SIGKILL, SIGPROF = -signal.SIGKILL, -signal.SIGPROF  # as exit codes
PLACES = (
    "step begins",
    "in the verifier",
    "after the refresh",
    "in a line of the journal",
    "within an accumulation window",
    "before the optimizer",
    "after the optimizer",
    "step ends",
    "while the memory is written",
    "after the checkpoint",
)
"""Moments at which a process can be killed. The guard works between the first and the fourth."""
UNGUARDED = tuple(p for p in PLACES if p.startswith(("step", "within", "before", "after the o", "after the c")))


@dataclass(frozen=True)
class Kill:
    """Kill `rank` at the first such place from optimizer step `step` on, and the others with it."""

    step: int
    place: str
    rank: int = 0


class Executioner(TrainerCallback):
    """Kill this process at the moment given, or never. `Last` stands behind the guard in the list of callbacks."""

    def __init__(self, kill, rank):
        self.kill, self.rank, self.trainer = kill, rank, None

    def due(self, place):
        chosen = self.kill is not None and (self.kill.rank, self.kill.place) == (self.rank, place)
        return chosen and self.trainer.state.global_step >= self.kill.step

    def here(self, place):
        if self.due(place):
            os.kill(os.getpid(), signal.SIGKILL)

    def visit(self, reward):
        """The same verifier as a place to be killed at."""

        def visited(completions, **columns):
            self.here("in the verifier")
            return reward(completions, **columns)

        return visited

    def watch(self, trainer):
        """Patch the places that are no event of a callback. The child ends, so nothing is undone."""
        self.trainer = trainer
        training_step = trainer.training_step

        def stepping(*args, **kwargs):
            result = training_step(*args, **kwargs)
            if not trainer.accelerator.sync_gradients:
                self.here("within an accumulation window")
            return result

        trainer.training_step = stepping
        write, replace = Path.open, os.replace

        def tearing(path, mode="r", *args, **kwargs):
            if path.name == JOURNAL_NAME and "a" in mode and self.due("in a line of the journal"):
                with write(path, "a") as file:
                    file.write('{"event": "refresh", "step": 7, "cos')
                self.here("in a line of the journal")
            return write(path, mode, *args, **kwargs)

        def renaming(source, target):
            if Path(target).name == FILE_NAME:
                self.here("while the memory is written")
            return replace(source, target)

        Path.open, os.replace = tearing, renaming

    def on_step_begin(self, args, state, control, **kwargs):
        self.here("step begins")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.here("before the optimizer")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.here("after the optimizer")

    def on_step_end(self, args, state, control, **kwargs):
        self.here("step ends")


class Last(TrainerCallback):
    """Mark a checkpoint as whole on this rank, from behind the guard in the list of callbacks."""

    def __init__(self, executioner):
        self.executioner = executioner

    def on_step_begin(self, args, state, control, **kwargs):
        self.executioner.here("after the refresh")

    def on_save(self, args, state, control, **kwargs):
        folder = self.executioner.folder / f"checkpoint-{state.global_step}"
        _mark(folder, self.executioner.rank).touch()
        self.executioner.here("after the checkpoint")


def newest_whole(folder, ranks, last):
    """The newest checkpoint before step `last` that every rank has finished, and its step; None and 0 without one.

    That of the last step is left out: the Trainer takes one step more when it resumes there, also without a guard.
    """
    found = {int(path.name.split("-")[1]): path for path in Path(folder).glob("checkpoint-*")}
    whole = [s for s, path in found.items() if s < last and all(_mark(path, r).exists() for r in range(ranks))]
    step = max(whole, default=0)
    for later in (path for number, path in found.items() if number > step):
        for rank in range(ranks):  # the next attempt writes it again, and may be killed while a rank does
            _mark(later, rank).unlink(missing_ok=True)
    return found.get(step), step


def attempt(train, folder, ranks, *, resume=None, kill=None, seconds=None, timeout=900):
    """Run `train(folder, resume, executioner)` in a forked process for each rank.

    Args:
        kill: the moment at which one rank dies. The others are killed once it is dead.
        seconds: of processor time after which a rank dies wherever it is; seconds of the clock depend on the load.
        timeout: seconds after which a run that hangs is a failure.

    Returns:
        What each rank returned with its seconds of processor time as "computed", or None where they were killed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()

    def killed(ends):
        return not {SIGKILL, SIGPROF}.isdisjoint(ends.values())

    children = [_start(train, folder, rank, ranks, port, resume, kill, seconds) for rank in range(ranks)]
    ends, limit = {}, time.monotonic() + timeout
    try:
        while len(ends) < ranks and not killed(ends) and time.monotonic() < limit:
            for child in set(children) - set(ends):
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    ends[child] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
    finally:
        for child in set(children) - set(ends):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    errors = [path.read_text() for path in folder.glob("error.rank*")]
    for path in folder.glob("error.rank*"):
        path.unlink()
    if killed(ends):
        return None  # the errors of the others are a consequence
    assert set(ends.values()) == {0}, "\n".join(errors)
    assert len(ends) == ranks, f"not through after {timeout} s\n" + "\n".join(errors)
    return [torch.load(folder / f"result.rank{rank}", weights_only=False) for rank in range(ranks)]


def killed_and_resumed(train, folder, ranks, kills, last):
    """Kill and resume attempts one after the other, and let the last one finish.

    Args:
        kills: for each killed attempt, a function from the step it begins at to a `Kill` or seconds of processor time.
        last: step of the run.

    Returns:
        What each rank returned in the end, and the steps from which the attempts were resumed.
    """
    folder, begins = Path(folder), []
    for choose in kills:
        resume, step = newest_whole(folder, ranks, last)
        begins.append(step)
        moment = choose(step)
        how = {"kill": moment} if isinstance(moment, Kill) else {"seconds": moment}
        if attempt(train, folder, ranks, resume=resume, **how) is not None:
            assert not isinstance(moment, Kill), f"no rank reached {moment}"
    resume, step = newest_whole(folder, ranks, last)
    return attempt(train, folder, ranks, resume=resume), [*begins, step]


def draws(seed, count, last, places=PLACES, ranks=1):
    """`count` random kills: functions from the step an attempt begins at."""
    generator = random.Random(seed)

    def choose(begin):
        place = generator.choice(places)
        first_rank_only = place in ("in a line of the journal", "while the memory is written")
        rank = 0 if first_rank_only else generator.randrange(ranks)
        # The first checkpoint comes before step 3, and every place comes once more before the end, at `last`.
        begin = max(begin, 3)
        return Kill(generator.randrange(begin, max(begin + 1, last - 2)), place, rank)

    return [choose] * count


def _mark(checkpoint, rank):
    return checkpoint / f"whole.rank{rank}"


def _start(train, folder, rank, ranks, port, resume, kill, seconds):
    child = os.fork()
    if child:
        return child
    try:
        said = os.open(folder / f"said.rank{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout = sys.stderr = os.fdopen(said, "w", buffering=1)  # pytest keeps those of the test
        logging.basicConfig(force=True, stream=sys.stderr)
        torch.set_num_threads(1)
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        executioner = Executioner(kill, rank)
        executioner.folder = folder
        began = time.process_time()
        if seconds is not None:
            signal.setitimer(signal.ITIMER_PROF, seconds)  # by default its signal ends the process
        result = train(folder, resume, executioner) | {"computed": time.process_time() - began}
        torch.save(result, folder / f"result.rank{rank}")
        os._exit(0)
    except BaseException:
        (folder / f"error.rank{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
