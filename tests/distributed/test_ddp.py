"""Several ranks: nothing changes, all decide the same, and one that fails leaves nobody waiting."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.worker import SCENARIOS, same_everywhere

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("guarded", ["with", "with_training_batch"])
def test_training_on_two_ranks_is_bit_for_bit_the_same(guarded, tmp_path):
    without = launch("without", tmp_path / "without", 2)
    found = launch(guarded, tmp_path / "with", 2)
    for rank in range(2):
        for what in ("weights", "rows", "rng"):
            assert without[rank][what] == found[rank][what]
    assert found[0]["gram"] is not None
    for what in ("status", "gram", "num_correct", "inner_product"):
        assert found[0][what] == found[1][what], "ranks must decide the same"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_see_what_one_process_sees(ranks, tmp_path):
    """11 prompts do not divide by 2 or 3: fillers must count nowhere."""
    single = same_everywhere(tmp_path / "single")
    found = launch("same_everywhere", tmp_path / "many", ranks)
    expected = torch.tensor(single["gram"])
    assert expected.abs().max() > 0
    for rank in range(ranks):
        assert found[rank]["num_correct"] == single["num_correct"]
        assert torch.allclose(
            torch.tensor(found[rank]["gram"]), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )
        assert found[rank]["gram"] == found[0]["gram"]


@pytest.mark.parametrize("scenario", ["reused_everywhere", "resampled_everywhere"])
def test_ranks_together_see_what_one_process_sees_in_kept_rollouts(scenario, tmp_path):
    single = SCENARIOS[scenario](tmp_path / "single")
    found = launch(scenario, tmp_path / "many", 2)
    reused = scenario == "reused_everywhere"
    assert (single["misses"] is not None) == reused
    assert (single["kept"]["resampled_at"] is None) == reused
    size = float(torch.tensor(single["gram"]).abs().max())
    for rank in range(2):
        assert found[rank]["gram"] == found[0]["gram"]
        assert torch.allclose(
            torch.tensor(found[rank]["gram"]), torch.tensor(single["gram"]), rtol=1e-3, atol=1e-3 * size
        )
        assert found[rank]["kept"] == found[0]["kept"]
        for name, value in single["kept"].items():
            assert found[rank]["kept"][name] == (None if value is None else pytest.approx(value, abs=1e-3))
        if reused:
            assert torch.allclose(torch.tensor(found[rank]["misses"]), torch.tensor(single["misses"]), rtol=1e-3)


@pytest.mark.parametrize(
    ("scenario", "words"), [("verifier_fails", "lost its sandbox"), ("sketch_fails", "out of memory")]
)
def test_a_failure_on_one_rank_voids_the_refresh_on_all(scenario, words, tmp_path):
    found = launch(scenario, tmp_path, 2)
    assert [(r["steps"], r["voids"], r["gram"]) for r in found] == [(3, 3, None)] * 2
    events = [json.loads(line) for line in (Path(tmp_path) / "run" / "passk_guard.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["start"] + ["failed_refresh"] * 3
    assert words in events[1]["reason"]
    assert "rank 1" in events[1]["reason"]
