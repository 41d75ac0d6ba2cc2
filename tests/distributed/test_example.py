"""The DeepSpeed example on two CPU processes, as the guide starts it, whole and resumed from its middle."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMES = ("time", "probe_seconds", "step_seconds", "mitigation_seconds")


def free_port():
    """A port for the ranks. The launcher of accelerate 1.4 chooses none itself and waits at port 0."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(config, folder, *more):
    """Run the example and return what it printed."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", free_port()]
    command += ["--config_file", f"examples/accelerate_configs/{config}.yaml", "-m", "tests.distributed.example_worker"]
    command += ["--ddp_backend=gloo", "--max_steps=4", "--refresh_steps=3", "--gate=always", f"--output_dir={folder}"]
    command += ["--save_strategy=steps", "--save_steps=2", *more]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def events(folder):
    lines = (folder / "passk_guard.jsonl").read_text().splitlines()
    found = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    return [event for event in found if event["event"] != "start"]


@pytest.mark.distributed
@pytest.mark.parametrize(("config", "stops"), [("zero2", False), ("zero3", True)])
def test_the_example_runs_and_resumes_as_if_it_had_not_stopped(config, stops, tmp_path):
    printed = start(config, tmp_path)
    assert re.search("DistributedType.DEEPSPEED on 2 processes: [1-4] of 4 steps", printed)
    assert re.search(r"step +0: pass@1 \d", printed)
    checkpoint = tmp_path / "checkpoint-2"
    for name in ("passk_guard.pt", "passk_guard_rank0.pt", "passk_guard_rank1.pt"):
        assert (checkpoint / name).is_file()
    if not stops:
        return
    whole = events(tmp_path)
    start(config, tmp_path, f"--resume_from_checkpoint={checkpoint}")
    resumed = events(tmp_path)[len(whole) :]
    assert any(event["event"] == "steps" and event["step"] == 3 for event in resumed), "guarded before any refresh"
    assert resumed == [e for e in whole if e["step"] > 2]
