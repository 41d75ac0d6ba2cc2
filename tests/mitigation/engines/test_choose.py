"""The engine follows from what the trainer holds, and what is untested is refused with what to do instead."""

import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from passk_guard.mitigation.engines.choose import choose_engine
from passk_guard.utils.errors import GuardError


def trainer(model=None, wrapped=None, **accelerator):
    model = nn.Linear(2, 2) if model is None else model
    settings = {"distributed_type": "NO", "device": torch.device("cpu"), "scaler": None, "has_lomo_optimizer": False}
    return SimpleNamespace(
        accelerator=SimpleNamespace(**settings | accelerator),
        model=model,
        model_wrapped=model if wrapped is None else wrapped,
    )


def test_a_plain_model():
    real = SimpleNamespace(accelerator=Accelerator(cpu=True), model=nn.Linear(2, 2))
    real.model_wrapped = real.model
    assert choose_engine(real).name == "plain"


def test_deepspeed_is_asked_for_its_own(monkeypatch):
    module = SimpleNamespace(deepspeed_engine=lambda trainer: ("deepspeed", trainer))
    monkeypatch.setitem(sys.modules, "passk_guard.mitigation.engines.deepspeed.choose", module)
    under_deepspeed = trainer(deepspeed_engine_wrapped=object())
    assert choose_engine(under_deepspeed) == ("deepspeed", under_deepspeed)


def test_a_compiled_model_is_reached_inside_its_wrapper():
    model = nn.Linear(2, 2)
    engine = choose_engine(trainer(model, torch.compile(model)))
    assert engine.name == "plain"
    assert engine._model is model


def with_hook(model):
    model.weight.register_post_accumulate_grad_hook(lambda _: None)
    return model


class LoadedWithPlan(nn.Linear):
    config, tp_size = None, 2


def spread():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))


def frozen():
    return nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (lambda: SimpleNamespace(model=nn.Linear(2, 2)), "accelerator.*project_gradient"),
        (lambda: trainer(distributed_type="MEGATRON_LM"), "Megatron"),
        (lambda: trainer(distributed_type=SimpleNamespace(value="XLA")), "TPU"),
        (lambda: trainer(device=torch.device("mps")), "MPS"),
        (lambda: trainer(parallelism_config=SimpleNamespace(tp_enabled=True)), "tensor parallelism.*tp_size to 1"),
        (lambda: trainer(parallelism_config=SimpleNamespace(cp_enabled=True)), "context parallelism"),
        (lambda: trainer(wrapped=nn.DataParallel(nn.Linear(2, 2))), "DataParallel.*torchrun"),
        (lambda: trainer(frozen()), "without a trainable parameter"),
        (lambda: trainer(LoadedWithPlan(2, 2)), "tp_plan"),
        (lambda: trainer(spread()), "cpu, meta.*device_map"),
        (lambda: trainer(with_hook(nn.Linear(2, 2))), "inside the backward pass.*adamw_torch"),
        (lambda: trainer(has_lomo_optimizer=True), "LOMO"),
    ],
)
def test_what_is_untested_is_refused(found, words):
    with pytest.raises(GuardError, match=words):
        choose_engine(found())


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_kinds_of_sharding_are_told_apart(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    flat, square = init_device_mesh("cpu", (1,)), init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    assert choose_engine(trainer(fully_shard(nn.Linear(2, 2), mesh=flat))).name == "fsdp2"
    ddp = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    assert choose_engine(trainer(ddp.module, ddp)).name == "ddp"
    hybrid = fully_shard(nn.Linear(2, 2), mesh=square)
    partly = nn.Sequential(fully_shard(nn.Linear(2, 2), mesh=flat), nn.Linear(2, 2))
    tensor_parallel = parallelize_module(nn.Linear(2, 2), flat, ColwiseParallel())
    for model, words in (
        (hybrid, "no HSDP"),
        (partly, "2 trained parameters outside of fully_shard"),
        (tensor_parallel, "tensor parallelism"),
        (FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")), "FSDP1.*fsdp_version"),
    ):
        with pytest.raises(GuardError, match=words):
            choose_engine(trainer(model))


def test_processes_that_nothing_connects_are_refused(one_process, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(GuardError, match="4 processes around a bare Linear"):
        choose_engine(trainer())
