"""The DeepSpeed example on two CPU processes, as the README starts it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
@pytest.mark.parametrize(("config", "device"), [("zero2", "--ddp_backend=gloo"), ("zero3", "--ddp_backend=gloo")])
def test_the_example_runs(config, device, tmp_path):
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", f"examples/accelerate_configs/{config}.yaml", "-m", "examples.grpo_deepspeed"]
    command += [device, "--max_steps=3", "--refresh_steps=2", "--gate=always", f"--output_dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search("DistributedType.DEEPSPEED on 2 processes: [123] of 3 steps turned by the guard", done.stdout)
    assert (tmp_path / "passk_guard.jsonl").is_file()
    assert re.search(r"step +0: pass@1 \d", done.stdout)
