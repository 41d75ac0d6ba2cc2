"""Launches of DeepSpeed on several ranks."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What each rank returned for some scenarios: one launch for all the tests that ask for the same."""
    pytest.importorskip("deepspeed")

    @cache
    def results(scenarios, ranks=2):
        folder = tmp_path_factory.mktemp("deepspeed")
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += ["-m", "tests.mitigation.engines.deepspeed_worker", scenarios, str(folder)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]

    def of_case(scenario, name, launch=None, ranks=2):
        """Results of one case by rank."""
        found = [rank[scenario][name] for rank in results(launch or scenario, ranks)]
        for result in found:
            assert "error" not in result, result["error"]
        return found

    return of_case
