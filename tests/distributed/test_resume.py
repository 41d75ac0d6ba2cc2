"""Two ranks of DDP, ZeRO-2 and ZeRO-3, killed at random moments and resumed, equal the uninterrupted run."""

import os
import subprocess
import sys
from functools import cache

import pytest
import torch

from tests.distributed.launch import ROOT
from tests.helpers.resume_cases import put_to_work, same_steps, same_weights

pytestmark = pytest.mark.resume


RUNS = {"ddp": ("unguarded", "both"), "zero2": ("unguarded", "both"), "zero3": ("unguarded", "observe", "both")}
"""Modes that every change is tested with; `make test-nightly` has the others."""


def on_engines(*modes):
    cases = [(engine, mode) for engine in RUNS for mode in modes]
    marks = {case: () if case[1] in RUNS[case[0]] else pytest.mark.nightly for case in cases}
    return pytest.mark.parametrize(("engine", "mode"), [pytest.param(*case, marks=marks[case]) for case in cases])


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """By engine, the results of all modes that the selected tests look at."""
    selected = [item.callspec.params for item in request.session.items if item.module is request.module]

    @cache
    def of(engine):
        folder = tmp_path_factory.mktemp(engine)
        modes = dict.fromkeys(["unguarded", *(case["mode"] for case in selected if case["engine"] == engine)])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        environment |= {
            "DS_ACCELERATOR": "cpu",
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        }  # ninja
        command = [sys.executable, "-m", "tests.distributed.resume_worker", engine, str(folder), *modes]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=2400)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return torch.load(folder / "found.pt", weights_only=False)

    return of


def equal(mode):
    """Parameters and random states of every rank, and that ranks agree."""
    for whole, cut in zip(mode["whole"], mode["cut"], strict=True):
        assert same_weights(whole, cut)
        assert torch.equal(whole["rng"], cut["rng"])
    assert same_weights(*mode["cut"])
    assert len(set(mode["begins"])) > 1, "some attempt must have gone on from a checkpoint"


@on_engines("unguarded")
def test_a_run_without_a_guard_resumes_exactly(engine, mode, found):
    """The trainer and the engine resume exactly themselves: all other equalities rest on this."""
    equal(found(engine)[mode])


@on_engines("observe", "both", "batch_reweight")
def test_a_killed_run_is_the_uninterrupted_one(engine, mode, found):
    run = found(engine)[mode]
    equal(run)
    assert run["events"]["cut"] == run["events"]["whole"]
    assert len(run["events"]["whole"]) >= 4, "ten steps, a refresh in every third"
    for whole, cut in zip(run["whole"], run["cut"], strict=True):
        assert cut["memory"] == whole["memory"]
        assert same_steps(whole, cut)
    assert run["lines"] > len(run["events"]["whole"]), "the journal holds the killed attempts too"


@on_engines("unguarded", "observe", "both", "batch_reweight")
def test_the_fixtures_put_the_guard_to_work(engine, mode, found):
    whole, unguarded = (found(engine)[name]["whole"] for name in (mode, "unguarded"))
    assert same_weights(whole[0], unguarded[0]) == (mode in ("unguarded", "observe"))
    for rank in whole:
        put_to_work(mode, rank)
