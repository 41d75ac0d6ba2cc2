"""Several ranks of DDP: observing changes nothing, and all ranks together see what one process sees."""

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.worker import SCENARIOS

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two ranks found in every scenario. To start the processes takes longer than a scenario."""
    scenarios = "without,with,with_training_batch,same_everywhere,resampled,budget,lonely,environments,hold,metric,"
    scenarios += "lonely_zero2,environments_zero2"
    return launch(scenarios, tmp_path_factory.mktemp("two"), 2)


@pytest.mark.parametrize("guarded", ["with", "with_training_batch"])
def test_training_on_two_ranks_is_bit_for_bit_the_same(guarded, two_ranks):
    for rank in two_ranks:
        for what in ("weights", "rows", "rng"):
            assert rank["without"][what] == rank[guarded][what]
    first, second = (rank[guarded] for rank in two_ranks)
    assert first["gram"] is not None
    for what in ("status", "gram", "num_correct", "inner_product", "change"):
        assert first[what] == second[what], "ranks must decide the same"


@pytest.mark.parametrize("engine", ["", "_zero2"])
def test_an_environment_that_fails_on_one_rank_costs_one_sample_on_both(engine, two_ranks):
    pairs = [(rank[f"environments{engine}"], rank[f"lonely{engine}"]) for rank in two_ranks]
    for guarded, lonely in pairs:
        assert guarded["weights"] == lonely["weights"]
        assert guarded["rows"] == lonely["rows"]
        assert guarded["engine"] == {"": "DistributedType.MULTI_CPU", "_zero2": "DistributedType.DEEPSPEED"}[engine]
        assert guarded["samples"] == [48, 47, 48], "the 25th on the second rank is of its second refresh"
        assert guarded["closed"] == 3 * 24, "as many as its share of completions, all closed"
    first, second = (guarded for guarded, _ in pairs)
    for what in ("gram", "num_correct", "inner_product", "change"):
        assert first[what] == second[what] is not None


def test_ranks_hold_pass_at_1_by_one_multiplier(two_ranks):
    first, second = (rank["hold"] for rank in two_ranks)
    assert first["hold"]["change"] is not None, "a window must have moved it"
    assert first["hold"]["multiplier"] not in (0.0, 0.5)
    assert first["hold"] == second["hold"]
    assert first["weights"] == second["weights"] != two_ranks[0]["without"]["weights"]


def test_ranks_hold_a_metric_by_one_multiplier(two_ranks):
    """Here it is the 0/1 reward, so that its level and change are those of pass@1."""
    first, second = (rank["metric"] for rank in two_ranks)
    assert first["hold"]["change"] is not None, "a window must have moved it"
    for what in ("hold", "change", "weights"):
        assert first[what] == second[what]
    assert_close(first["change"]["metric"]["curve"], first["change"]["fused"]["pass_at_1"])


def test_three_ranks_together_see_what_one_process_sees(tmp_path):
    """11 prompts do not divide by 3: fillers must not count. Engines are compared in test_projection.py."""
    compare_windows(launch("same_everywhere", tmp_path / "three", 3), tmp_path)


def test_two_ranks_together_see_what_one_process_sees(two_ranks, tmp_path):
    compare_windows(two_ranks, tmp_path)


def compare_windows(ranks, tmp_path):
    """Assert that windows of the realised change, and all they add up to, are those of one process."""
    single = compare("same_everywhere", ranks, tmp_path)
    assert [(window["since"], window["step"]) for window in single["windows"]] == [(0, 1), (1, 2), (2, 3)]
    assert all(abs(window["numbers"]["pass_at_1_change"]) > 1e-3 for window in single["windows"])
    assert all(len(window["per_prompt"]) == 11 for window in single["windows"])
    for rank in (each["same_everywhere"] for each in ranks):
        for what in ("windows", "change"):
            assert rank[what] == ranks[0]["same_everywhere"][what], "the same bits on every rank"
    first = ranks[0]["same_everywhere"]
    assert_close(first["windows"], single["windows"])
    assert_close(first["change"], single["change"])


def test_ranks_sample_again_together(two_ranks, tmp_path):
    """Rollouts of an earlier policy are given up on all ranks by the effective sample size over all of them."""
    single = compare("resampled", two_ranks, tmp_path)
    assert single["kept"]["resampled_at"] is not None
    for rank in two_ranks:
        for name, value in single["kept"].items():
            assert rank["resampled"]["kept"][name] == (None if value is None else pytest.approx(value, abs=1e-3))


def test_ranks_with_unequal_work_refresh_at_the_same_steps(two_ranks):
    first, second = (rank["budget"] for rank in two_ranks)
    assert first == second
    assert 2 <= first["refreshes"] < 12


def assert_close(found, expected, absolute=1e-5):
    """Assert that lists, mappings and numbers in them agree but for rounding in float32."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, absolute)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=absolute)
    else:
        assert found == expected


def compare(scenario, ranks, tmp_path):
    """Assert that every rank found what one process finds, which is returned."""
    single = SCENARIOS[scenario](tmp_path / "single")
    gram = torch.tensor(single["gram"])
    assert gram.abs().max() > 0
    for rank in (each[scenario] for each in ranks):
        assert rank["gram"] == ranks[0][scenario]["gram"]
        assert torch.allclose(torch.tensor(rank["gram"]), gram, rtol=1e-3, atol=1e-4 * float(gram.abs().max()))
        assert rank["num_correct"] == single["num_correct"]
    return single
