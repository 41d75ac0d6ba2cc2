"""The whole guard on several engines: the same projected run as in one plain process."""

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.projection_worker import run
from tests.distributed.test_ddp import assert_close
from tests.helpers.tiny import tiny_model
from tests.mitigation.engines.test_fsdp import takes_sharded_models

pytestmark = pytest.mark.distributed
ENGINES = ["ddp", "zero0", "zero1", "zero2", "zero3", pytest.param("fsdp2", marks=takes_sharded_models)]


def flat(weights):
    return torch.cat([torch.tensor(values, dtype=torch.float64).flatten() for _, values in sorted(weights.items())])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The guarded run of one plain process, and how far it moved."""
    found = run("plain", "project", tmp_path_factory.mktemp("plain"))
    start = {n: p.detach().double().tolist() for n, p in tiny_model(initializer_range=0.1).named_parameters()}
    assert sum(found["mitigated"]) == 4, "every step of the fixture must be edited"
    return found | {"moved": (flat(found["weights"]) - flat(start)).norm()}


@pytest.fixture(scope="module")
def reusing(tmp_path_factory):
    """The run of one plain process that reuses its rollouts in all but the first of four refreshes."""
    found = run("plain", "reuse", tmp_path_factory.mktemp("reusing"))
    assert 0.01 < found["kept"]["effective_samples"] < 1, "the newest refresh of the fixture must reuse its samples"
    return found


@pytest.fixture(scope="module")
def observing(tmp_path_factory):
    """Runs of one plain process that change nothing, with new samples and with kept ones."""
    return {name: run("plain", name, tmp_path_factory.mktemp(name)) for name in ("observe", "observe_reuse")}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, tmp_path_factory):
    """What each of two ranks found in all runs on one engine."""
    folder = tmp_path_factory.mktemp(request.param)
    return launch(request.param, folder, 2, timeout=600, worker="tests.distributed.projection_worker")


def test_a_guarded_run_is_that_of_one_plain_process(engine, plain):
    first, second = (rank["project"] for rank in engine)
    assert first["weights"] == second["weights"]
    expected = flat(plain["weights"])
    assert float((flat(first["weights"]) - expected).norm() / plain["moved"]) < 2e-5
    assert first["mitigated"] == plain["mitigated"]
    assert first["train_cosine"] == pytest.approx(plain["train_cosine"], abs=1e-4)
    gram = torch.tensor(plain["gram"], dtype=torch.float64)
    assert torch.allclose(
        torch.tensor(first["gram"], dtype=torch.float64), gram, rtol=1e-4, atol=1e-4 * float(gram.max())
    )
    unguarded = flat(engine[0]["without"]["weights"])
    assert float((unguarded - expected).norm() / plain["moved"]) > 0.05, "the edit must matter"


def test_observing_is_bit_for_bit_no_guard(engine):
    for rank in engine:
        assert rank["observe"]["weights"] == rank["without"]["weights"]
        assert (rank["observe"]["failures"], rank["observe"]["steps"]) == (0, 4)


@pytest.mark.parametrize(("variant", "ends"), [("observe", [(0, 2)]), ("observe_reuse", [(0, 1), (0, 2), (0, 3)])])
def test_the_realised_change_is_that_of_one_plain_process(variant, ends, engine, observing):
    """Also where no rank holds a whole weight between two passes."""
    single, (first, second) = observing[variant], (rank[variant] for rank in engine)
    assert [(window["since"], window["step"]) for window in single["windows"]] == ends
    assert all(window["numbers"]["effective_samples"] < 0.95 for window in single["windows"]), "the policy must move"
    assert abs(single["windows"][-1]["numbers"]["pass_at_1_change"]) > 0.01
    for what in ("windows", "change"):
        assert first[what] == second[what], "the same bits on every rank"
        assert_close(first[what], single[what], absolute=5e-5)


def test_kept_rollouts_are_reweighted_and_projected_as_in_one_plain_process(engine, reusing, plain):
    first, second = (rank["reuse"] for rank in engine)
    assert first["weights"] == second["weights"]
    assert first["failures"] == 0
    assert float((flat(first["weights"]) - flat(reusing["weights"])).norm() / plain["moved"]) < 2e-5
    assert first["mitigated"] == reusing["mitigated"]
    assert first["kept"]["effective_samples"] == pytest.approx(reusing["kept"]["effective_samples"], abs=1e-4)
    assert torch.allclose(torch.tensor(first["misses"]), torch.tensor(reusing["misses"]), rtol=1e-4)
    gram = torch.tensor(reusing["newest_gram"])
    assert torch.allclose(torch.tensor(first["newest_gram"]), gram, rtol=1e-4, atol=1e-4 * float(gram.max()))
    for rank in engine:
        assert rank["observe_reuse"]["weights"] == rank["without"]["weights"]
        assert rank["observe_reuse"]["failures"] == 0
        assert rank["observe_reuse"]["misses"] is not None


def test_pass_at_1_is_held_by_the_gradient_as_in_one_plain_process(engine, plain, tmp_path):
    """Lambda is the same bits on every rank, as its windows are, and so is what is added to the gradient."""
    if "hold" not in engine[0]:
        pytest.skip("held on two engines")
    first, second = (rank["hold"] for rank in engine)
    single = run("plain", "hold", tmp_path)
    assert first["hold"] == second["hold"]
    assert first["weights"] == second["weights"]
    assert single["hold"]["change"] is not None, "a window must have moved lambda"
    assert_close(first["hold"], single["hold"], absolute=5e-4)
    expected = flat(single["weights"])
    assert float((flat(first["weights"]) - expected).norm() / plain["moved"]) < 2e-5
    assert float((flat(engine[0]["without"]["weights"]) - expected).norm() / plain["moved"]) > 0.05
    assert first["mitigated"] == single["mitigated"]
    assert first["mitigated"][:2] == [1.0, 1.0]


def test_a_harvest_that_fails_on_one_rank_leaves_all_steps_unguarded(engine):
    for rank in engine:
        assert rank["rank_1_fails"]["failures"] == 2
        assert rank["rank_1_fails"]["mitigated"] == []
        assert rank["rank_1_fails"]["weights"] == rank["without"]["weights"]
