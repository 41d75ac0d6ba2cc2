"""Two ranks of DDP, ZeRO-2 and ZeRO-3, killed at random moments and resumed, equal the uninterrupted run."""

import os
import subprocess
import sys

import pytest
import torch

from tests.distributed.launch import ROOT
from tests.helpers.resume_cases import put_to_work, same_steps, same_weights

pytestmark = pytest.mark.resume


@pytest.fixture(scope="module", params=["ddp", "zero2", "zero3"])
def found(request, tmp_path_factory):
    """The results of every mode on one engine."""
    folder = tmp_path_factory.mktemp(request.param)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"DS_ACCELERATOR": "cpu", "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}  # ninja
    command = [sys.executable, "-m", "tests.distributed.resume_worker", request.param, str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return torch.load(folder / "found.pt", weights_only=False)


def equal(mode):
    """Parameters and random states of every rank, and that ranks agree."""
    for whole, cut in zip(mode["whole"], mode["cut"], strict=True):
        assert same_weights(whole, cut)
        assert torch.equal(whole["rng"], cut["rng"])
    assert same_weights(*mode["cut"])
    assert len(set(mode["begins"])) > 1, "some attempt must have gone on from a checkpoint"


def test_a_run_without_a_guard_resumes_exactly(found):
    """The trainer and the engine resume exactly themselves: all other equalities rest on this."""
    equal(found["unguarded"])


@pytest.mark.parametrize("mode", ["observe", "both", "batch_reweight"])
def test_a_killed_run_is_the_uninterrupted_one(found, mode):
    run = found[mode]
    equal(run)
    assert run["events"]["cut"] == run["events"]["whole"]
    assert len(run["events"]["whole"]) >= 4, "ten steps, a refresh in every third"
    for whole, cut in zip(run["whole"], run["cut"], strict=True):
        assert cut["memory"] == whole["memory"]
        assert same_steps(whole, cut)
    assert run["lines"] > len(run["events"]["whole"]), "the journal holds the killed attempts too"


def test_the_fixtures_put_the_guard_to_work(found):
    assert same_weights(found["observe"]["whole"][0], found["unguarded"]["whole"][0])
    for mode in ("both", "batch_reweight"):
        assert not same_weights(found[mode]["whole"][0], found["unguarded"]["whole"][0])
    for mode, run in found.items():
        for rank in run["whole"]:
            put_to_work(mode, rank)
