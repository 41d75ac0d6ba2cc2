"""Starting a worker module on several processes, leaving it, and reading what each rank wrote."""

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def launch(scenario, folder, ranks, timeout=240, worker="tests.distributed.worker", **how):
    """Run the module `worker` and return the JSON each rank left in `folder`, in order of rank."""
    start(worker, [scenario, str(folder)], ranks, folder, timeout, **how)
    return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def start(worker, arguments, ranks, folder, timeout, device="cpu", anew=False):
    """Run a module on several ranks, which all must end well.

    Args:
        folder: of what each rank says.
        timeout: in seconds.
        anew: starts new interpreters by `torchrun`. Otherwise the ranks are forks of a process that has imported torch,
            TRL and DeepSpeed, which takes a rank ten seconds of processor time. `LAUNCH=torchrun` in the environment
            starts all of them anew.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    if anew or device != "cpu" or os.environ.get("LAUNCH") == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += ["-m", worker, *arguments]
        environment = _environment(device)
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return
    wanted = {"worker": worker, "arguments": arguments, "ranks": ranks, "folder": str(folder), "timeout": timeout}
    forks = _forks()
    print(json.dumps(wanted), file=forks.stdin, flush=True)
    answer = forks.stdout.readline()
    assert answer, "the process that forks the ranks has ended"
    if any(json.loads(answer)):
        said = [(Path(folder) / f"said.rank{rank}").read_text()[-6000:] for rank in range(ranks)]
        raise AssertionError(f"the ranks ended with {answer}\n" + "\n\n".join(said))


def leave():
    """End a worker whose result is written: gloo's threads abort about one interpreter shutdown in twenty."""
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _environment(device):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja
    return environment | {"DS_ACCELERATOR": device, "PATH": path}


@cache
def _forks():
    command, pipe = [sys.executable, "-m", "tests.distributed.forks"], subprocess.PIPE
    forks = subprocess.Popen(command, env=_environment("cpu"), cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    atexit.register(forks.communicate)  # ends it
    return forks
