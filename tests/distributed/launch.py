"""Starting a worker module on several processes, leaving it, and reading what each rank wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def launch(scenario, folder, ranks, timeout=240, worker="tests.distributed.worker", device="cpu"):
    """Run the module `worker` and return the JSON each rank left in `folder`, in order of rank."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"DS_ACCELERATOR": device, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", worker, scenario, str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def leave():
    """End a worker whose result is written: gloo's threads abort about one interpreter shutdown in twenty."""
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
