"""Several ranks of DDP: observing changes nothing, and all ranks together see what one process sees."""

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.worker import SCENARIOS, same_everywhere

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two ranks found in every scenario; one start of the processes takes longer than a scenario."""
    return launch(",".join(SCENARIOS), tmp_path_factory.mktemp("two"), 2)


@pytest.mark.parametrize("guarded", ["with", "with_training_batch"])
def test_training_on_two_ranks_is_bit_for_bit_the_same(guarded, two_ranks):
    for rank in two_ranks:
        for what in ("weights", "rows", "rng"):
            assert rank["without"][what] == rank[guarded][what]
    first, second = (rank[guarded] for rank in two_ranks)
    assert first["gram"] is not None
    for what in ("status", "gram", "num_correct", "inner_product"):
        assert first[what] == second[what], "ranks must decide the same"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_see_what_one_process_sees(ranks, two_ranks, tmp_path):
    """11 prompts do not divide by 2 or 3: fillers must count nowhere."""
    single = same_everywhere(tmp_path / "single")
    found = two_ranks if ranks == 2 else launch("same_everywhere", tmp_path / "many", ranks)
    expected = torch.tensor(single["gram"])
    assert expected.abs().max() > 0
    for rank in (each["same_everywhere"] for each in found):
        assert rank["num_correct"] == single["num_correct"]
        assert torch.allclose(torch.tensor(rank["gram"]), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert rank["gram"] == found[0]["same_everywhere"]["gram"]


@pytest.mark.parametrize("scenario", ["reused_everywhere", "resampled_everywhere"])
def test_ranks_together_see_what_one_process_sees_in_kept_rollouts(scenario, two_ranks, tmp_path):
    single = SCENARIOS[scenario](tmp_path / "single")
    reused = scenario == "reused_everywhere"
    assert (single["misses"] is not None) == reused
    assert (single["kept"]["resampled_at"] is None) == reused
    size = float(torch.tensor(single["gram"]).abs().max())
    for rank in (each[scenario] for each in two_ranks):
        assert rank["gram"] == two_ranks[0][scenario]["gram"]
        assert torch.allclose(torch.tensor(rank["gram"]), torch.tensor(single["gram"]), rtol=1e-3, atol=1e-3 * size)
        assert rank["kept"] == two_ranks[0][scenario]["kept"]
        for name, value in single["kept"].items():
            assert rank["kept"][name] == (None if value is None else pytest.approx(value, abs=1e-3))
        if reused:
            assert torch.allclose(torch.tensor(rank["misses"]), torch.tensor(single["misses"]), rtol=1e-3)
