"""A process that has imported everything and forks the ranks of one launch after another.

`python -m tests.distributed.forks` reads a launch from each line of its input, as JSON: the module `worker`, its
`arguments`, the number of `ranks`, the `folder` in which each rank leaves what it says, and `timeout` in seconds. It
answers with one line: how each rank ended. Nothing of a launch is left for the next but files.
"""

import faulthandler
import gc
import json
import os
import random
import runpy
import signal
import socket
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

import numpy
import torch
import trl.trainer.grpo_trainer  # noqa: F401


def ready():
    """Load DeepSpeed and its operator too, and hide all of it from the garbage collector."""
    if find_spec("deepspeed"):
        from deepspeed.comm.torch import build_shm_op

        build_shm_op()
    gc.collect()
    gc.freeze()


def free_port():
    """A port below those that the system gives out by itself: until rank 0 listens there, others open theirs."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def run_rank(worker, arguments, folder, environment):
    """The whole life of one rank, in the child."""
    code = 1
    try:
        said = os.open(Path(folder) / f"said.rank{environment['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(said, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.enable()
        numpy.random.seed()
        torch.set_num_threads(1)
        os.environ |= environment
        sys.argv[1:] = arguments
        runpy.run_module(worker, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as leaving:
        code = int(bool(leaving.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_ranks(worker, arguments, ranks, folder, timeout):
    """The exit codes of all ranks. The first that fails ends the others; so does the timeout, with tracebacks."""
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children, codes, limit = [], {}, time.monotonic() + timeout
    try:
        for rank in range(ranks):
            child = os.fork()
            if not child:
                run_rank(worker, arguments, folder, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            children.append(child)
        while len(codes) < ranks and not any(codes.values()) and time.monotonic() < limit:
            collect(children, codes, os.WNOHANG)
            time.sleep(0.01)
        for child in set(children) - set(codes):
            os.kill(child, signal.SIGABRT)  # Python says where it was
            time.sleep(0.5)
    finally:
        for child in set(children) - set(codes):
            os.kill(child, signal.SIGKILL)
        collect(children, codes, 0)
    return [codes[child] for child in children]


def collect(children, codes, options):
    """Add the exit codes of the children that have ended."""
    for child in set(children) - set(codes):
        found, status = os.waitpid(child, options)
        if found:
            codes[child] = os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is printed is no answer
    ready()
    for line in sys.stdin:
        print(json.dumps(run_ranks(**json.loads(line))), file=answers)
