"""The guard on ZeRO-2 and ZeRO-3 in one process, on a GPU with NCCL: the run of one plain process on the CPU.

Not on the CPU: `test_projection.py` has it there, on two ranks.
"""

import pytest

from tests.distributed.launch import launch
from tests.distributed.projection_worker import run
from tests.distributed.test_projection import flat
from tests.helpers.devices import CUDA
from tests.helpers.tiny import tiny_model


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return flat(run("plain", "project", tmp_path_factory.mktemp("plain"))["weights"])


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_guarded_run_on_one_device_is_that_of_a_plain_process(engine, device, plain, tmp_path, record_property):
    pytest.importorskip("deepspeed")
    (found,) = launch(engine, tmp_path, 1, worker="tests.distributed.projection_worker", device=device)
    assert found["project"]["failures"] == 0
    assert sum(found["project"]["mitigated"]) == 4, "every step must be edited"
    assert found["observe"]["weights"] == found["without"]["weights"]
    start = flat({n: p.detach().double().tolist() for n, p in tiny_model(initializer_range=0.1).named_parameters()})
    error = float((flat(found["project"]["weights"]) - plain).norm() / (plain - start).norm())
    record_property("distance", error)
    assert error < 2e-3
