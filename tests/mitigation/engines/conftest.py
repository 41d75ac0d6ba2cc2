"""Launches of DeepSpeed on several ranks."""

from functools import cache

import pytest
import torch

from tests.distributed.launch import start


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What each rank returned for some scenarios: one launch for all the tests that ask for the same."""
    pytest.importorskip("deepspeed")

    @cache
    def results(scenarios, ranks=2):
        folder = tmp_path_factory.mktemp("deepspeed")
        worker = "tests.mitigation.engines.deepspeed_worker"
        start(worker, [scenarios, str(folder)], ranks, folder, timeout=600)
        return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]

    def of_case(scenario, name, launch=None, ranks=2):
        """Results of one case by rank."""
        found = [rank[scenario][name] for rank in results(launch or scenario, ranks)]
        for result in found:
            assert "error" not in result, result["error"]
        return found

    return of_case
