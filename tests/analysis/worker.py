"""One rank of an analysis: `python -m tests.analysis.worker SCENARIO FOLDER`."""

import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

from passk_guard import GuardError
from tests.analysis.cases import command, compare_command, quick
from tests.distributed.launch import leave
from tests.helpers.tiny import digit_reward

RANK = int(os.environ.get("RANK", 0))


def by_command(folder):
    """The command line itself, `model.generate` and all; accelerate starts the process group."""
    options = ("--last-layer", "--batch-size", "16")
    return {"status": command(folder / "model", folder / "probe.jsonl", folder / "out", *options)}


def compared(folder):
    """The gate of the command line on two checkpoints: what each rank decides, and what each says."""
    out = io.StringIO()
    with redirect_stdout(out):
        status = compare_command(folder)
    return {"status": status, "out": out.getvalue()}


def one_rank_fails(folder):
    from accelerate import PartialState

    PartialState(cpu=True)

    def verifier(completions, **_):
        if RANK == 1:
            raise ValueError("rank 1 lost its sandbox")
        return digit_reward(completions)

    return refused(lambda: quick_with(verifier, folder))


def first_rank_refuses(folder):
    """A foreign file in the output folder is seen by the first rank alone."""
    from accelerate import PartialState

    PartialState(cpu=True)
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / "notes.txt").write_text("mine")
    return refused(lambda: quick(out=folder / "out"))


def quick_with(verifier, folder):
    from passk_guard.analysis import analyze
    from tests.analysis.cases import QUICK, PromptSampler
    from tests.helpers.tiny import probe_rows, tiny_model, tiny_tokenizer

    analyze(tiny_model(), tiny_tokenizer(), probe_rows(11), verifier, sampler=PromptSampler(), **QUICK)


def refused(run):
    try:
        run()
    except GuardError as error:
        return {"refused": str(error)}
    return {"refused": None}


SCENARIOS = {
    "command": by_command,
    "compared": compared,
    "one_rank_fails": one_rank_fails,
    "first_rank_refuses": first_rank_refuses,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    result = SCENARIOS[sys.argv[1]](folder)
    (folder / f"rank{RANK}.json").write_text(json.dumps(result))
    leave()
