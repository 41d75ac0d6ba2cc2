"""DeepSpeed engines: a guarded run equals one process of plain PyTorch, and a probe leaves no trace."""

from types import SimpleNamespace

import pytest
import torch

from passk_guard.mitigation.engines.deepspeed.choose import deepspeed_engine
from passk_guard.mitigation.engines.deepspeed.restore import Lent
from passk_guard.utils.errors import GuardError
from tests.mitigation.engines import neutral, oracle
from tests.mitigation.engines.deepspeed_cases import EXACT, STAGES
from tests.mitigation.engines.deepspeed_checks import (
    beginning,
    check_history,
    check_run,
    error_of,
    recipe_of,
    reference,
)

DEFAULT = "exact,replaced,failed,misused,own_loop"
"""Scenarios of one launch."""


@pytest.mark.distributed
@pytest.mark.parametrize("name", EXACT)
def test_a_guarded_run_equals_one_process(launched, name):
    check_run(launched("exact", name, DEFAULT), name, 1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("name", STAGES)
def test_the_optimizer_gets_the_probe_gradient_of_one_process(launched, name):
    first = launched("replaced", name, DEFAULT)[0]
    recipe = recipe_of(name, 2, **first["changes"])
    expected = oracle.full_probe_gradient(oracle.build_model(recipe), recipe)
    start = beginning(recipe)
    step = {key: start[key] - value for key, value in first["weights"].items()}  # the learning rate of SGD is 1
    tolerance = 8e-2 if "bf16" in name else 2e-6
    zeros = {key: torch.zeros_like(value) for key, value in expected.items()}
    assert oracle.relative_error(step, expected, zeros) < tolerance
    norm = float(oracle.flat(expected.values()) @ oracle.flat(expected.values()))
    assert first["norm"] == pytest.approx(norm, rel=tolerance)


@pytest.mark.distributed
@pytest.mark.parametrize("name", STAGES)
def test_a_probe_that_fails_leaves_no_trace_either(launched, name):
    ranks = launched("failed", name, DEFAULT)
    for index, rank in enumerate(ranks):
        last = "Boom" if index == len(ranks) - 1 else "FailedRefresh"
        ways = ["before", "after", "forward", "backward", "shape", "one_rank"]
        kinds = ["Boom", "Boom", "Boom", "Boom", "GuardError", last]
        assert rank["raised"] == list(zip(ways, kinds, strict=True)) * 3
        assert rank["changed"] == []
        assert rank["same"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", STAGES)
def test_misuse_is_refused_and_remove_leaves_nothing(launched, name):
    for rank in launched("misused", name, DEFAULT):
        step = ["uneven", "none", "outside", "add outside", "window", "inside"]
        assert [what for what, _ in rank["refused"]] == ["twice"] + step * 3
        assert all("found" in text or "asked for" in text or "already" in text for _, text in rank["refused"])
        assert rank["left"] == set()
        assert rank["same"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", [n for n in STAGES if "bf16" not in n])
def test_a_loop_that_steps_on_every_micro_batch_is_edited_once_a_step(launched, name):
    ranks = launched("own_loop", name, DEFAULT)
    assert error_of(ranks[0]["weights"], recipe_of(name, 2)) < 1e-6
    for rank in ranks:
        check_history(rank["history"], reference(recipe_of(name, 2))[1], 1e-5)


def optimizer(kind="DeepSpeedZeroOptimizer", **attributes):
    """A stand-in of DeepSpeed's class of this name."""
    inner = type(attributes.pop("inner", "AdamW"), (), {})()
    return type(kind, (), {"optimizer": inner, "cpu_offload": False} | attributes)()


def engine(**attributes):
    names = ("step", "backward", "set_gradient_accumulation_boundary", "is_gradient_accumulation_boundary")
    methods = {name: lambda *args, **kwargs: True for name in names}
    fields = {"optimizer": optimizer(), "module": torch.nn.Linear(1, 1), "device": torch.device("cpu")}
    return SimpleNamespace(**(neutral.ENGINE | methods | fields | attributes))


def choose(found):
    wrapped = None if found is None else SimpleNamespace(engine=found)
    return deepspeed_engine(SimpleNamespace(accelerator=SimpleNamespace(deepspeed_engine_wrapped=wrapped)))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "on_train_begin"),
        (engine(pipeline_parallelism=True), "pipeline parallelism"),
        (engine(mpu=object()), "tensor or sequence parallelism"),
        (engine(autotp_size=lambda: 2), "autotp_size"),
        (engine(optimizer=optimizer(sequence_parallel_size=2)), "sequence parallelism"),
        (engine(has_moe_layers=True), "mixture of experts"),
        (engine(zero_hpz_partition_size=lambda: 8), "zero_hpz_partition_size=8"),
        (engine(zero_quantized_weights=lambda: True), "zero_quantized_weights"),
        (engine(zero_quantized_gradients=lambda: True), "zero_quantized_gradients"),
        (engine(zero_offload_optimizer=lambda: SimpleNamespace(device="nvme")), "NVMe offload"),
        (engine(zero_offload_param=lambda: SimpleNamespace(device=SimpleNamespace(value="nvme"))), "offload_param"),
        (engine(zero_partial_offload=lambda: 0.5), "partial optimizer offload"),
        (engine(zenflow=True), "ZenFlow"),
        (engine(is_deepcompile_enabled=lambda: True), "DeepCompile"),
        (engine(managed_gradient_accumulation=lambda: False), "managed_gradient_accumulation"),
        (engine(gradient_average=False), "summed over ranks"),
        (engine(enable_backward_allreduce=False), "communicates by itself"),
        (engine(optimizer=optimizer(inner="MuonWithAuxAdam")), "Muon"),
        (engine(optimizer=optimizer(master_weights_and_grads_dtype=torch.bfloat16)), "master weights"),
        (engine(optimizer=optimizer(torch_autocast_gradscaler=object())), "torch autocast"),
        (engine(torch_autocast_z0_gradscaler=object()), "torch autocast"),
        (engine(optimizer=optimizer("FP16_UnfusedOptimizer")), "ZeRO-0 in half precision"),
        (engine(optimizer=optimizer("FP16_Optimizer")), "ZeRO-0 in half precision"),
        (engine(optimizer=optimizer("MiCS_Optimizer")), "found MiCS_Optimizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_was_never_measured_is_refused(found, message):
    with pytest.raises(GuardError, match=message) as refusal:
        choose(found)
    if found is not None:
        assert "0.19.8" in str(refusal.value)


def test_lent_buffers_come_back_and_the_result_is_kept():
    buffers = [torch.arange(5.0), torch.ones(2, 3)]
    lent = Lent(buffers)
    for buffer in buffers:
        buffer.mul_(2).add_(1)
    taken = lent.take()
    lent.restore()
    assert [t.tolist() for t in taken] == [[1.0, 3.0, 5.0, 7.0, 9.0], [[3.0] * 3] * 2]
    assert [b.tolist() for b in buffers] == [[0.0, 1.0, 2.0, 3.0, 4.0], [[1.0] * 3] * 2]
    untaken = Lent(buffers)
    buffers[0].zero_()
    untaken.restore()
    assert buffers[0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
