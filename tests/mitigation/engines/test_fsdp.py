"""FSDP2 over 2 and 3 ranks: equal to textbook PyTorch in one process."""

import inspect

import pytest
import torch
from accelerate import Accelerator

from tests.distributed.launch import launch
from tests.mitigation.engines import oracle
from tests.mitigation.engines.native_worker import SHARDED, recipe_of, rescored
from tests.mitigation.engines.test_native import WORKER, check_against_oracle

pytestmark = pytest.mark.distributed
takes_sharded_models = pytest.mark.skipif(
    "_is_accelerate_prepared" not in inspect.getsource(Accelerator.prepare_model),
    reason="accelerate before 1.13 wraps a sharded model on a CPU in DDP; it shards by itself on GPUs, from 1.6 on",
)


@takes_sharded_models
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_run_equals_the_textbook(ranks, tmp_path):
    found = launch("fsdp", tmp_path, ranks, worker=WORKER)
    for case in SHARDED:
        assert found[0][case]["engine"] == "fsdp2"
        assert all(other[case] == found[0][case] for other in found)
        check_against_oracle(found[0][case], case, ranks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_by_hand(ranks, tmp_path):
    found = launch("fsdp_by_hand", tmp_path, ranks, worker=WORKER)
    recipe = recipe_of("unused", ranks)
    model = oracle.build_model(recipe)
    expected = oracle.full_probe_gradient(model, recipe)
    missing = [name for name, _ in model.named_parameters()][3]
    assert expected[missing].any(), "a missing gradient must be created where the direction is not zero"
    before = {name: 2.0 * torch.ones_like(p) * (name != missing) for name, p in expected.items()}
    p, g = oracle.flat(expected.values()), oracle.flat(before.values())
    ratios = rescored(model, 0, 1)
    assert float(ratios.abs().max()) > 0.1
    for rank in found:
        assert rank["rescored"] == found[0]["rescored"], "the same bits on every rank"
        assert torch.allclose(torch.tensor(rank["rescored"], dtype=torch.float64), ratios, atol=1e-4)
        assert rank["untouched"]
        assert rank["products"] == pytest.approx([float(p @ p), float(p @ g)], rel=1e-12)
        assert rank["missing"] == []
        for name, gradient in rank["edited"].items():
            assert torch.allclose(torch.tensor(gradient).double(), before[name] + 0.5 * expected[name], rtol=1e-6)


@takes_sharded_models
def test_a_probe_changes_nothing(tmp_path):
    for rank in launch("fsdp_probing", tmp_path, 2, worker=WORKER):
        for without, probed in rank.values():
            assert len(probed["history"]) == 3
            assert without["weights"] == probed["weights"]


@takes_sharded_models
def test_a_loss_that_fails_on_every_rank_leaves_training_as_it_was(tmp_path):
    for rank in launch("fsdp_loss_fails", tmp_path, 2, worker=WORKER):
        for where in ("between", "forward", "backward"):
            assert rank[where]["errors"] == ["ValueError: this batch is broken"] * 3
            assert rank[where]["weights"] == rank["None"]["weights"], where
