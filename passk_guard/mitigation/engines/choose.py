"""Which engine a trainer holds, or why its gradients cannot be edited.

Refused are all arrangements on which nobody has checked that an edited gradient reaches the optimizer.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

from passk_guard.mitigation.engines.native import NativeEngine, ShardedEngine
from passk_guard.mitigation.engines.protocol import GradientEngine
from passk_guard.utils.errors import GuardError
from passk_guard.utils.private_api import REWEIGHT, requires

_KINDS = {"MEGATRON_LM": "Megatron-LM", "XLA": "XLA (TPU)"}
_PARALLEL = {"tp": "tensor", "cp": "context", "sp": "sequence"}
DEEPSPEED_NEEDS = requires(
    "accelerate",
    "Accelerator",
    "projecting gradients under DeepSpeed",
    REWEIGHT,
    deepspeed_engine_wrapped="shows that DeepSpeed holds the gradient",
)
COMPILED_NEEDS = requires(
    "torch",
    "OptimizedModule",
    "projecting gradients of a model under torch.compile",
    REWEIGHT,
    _orig_mod="the module inside the wrapper",
)


def choose_engine(trainer: Any) -> GradientEngine:
    """The engine of this trainer, by what it holds: no setting is read.

    Args:
        trainer: a transformers Trainer whose train() has begun (`on_train_begin`): its model is wrapped only then.

    Raises:
        GuardError: for an arrangement on which editing gradients is not tested, with what was found and what to do:
            FSDP1, FSDP2 on a mesh of several dimensions or with unsharded trained parameters, tensor, pipeline,
            context, sequence and expert parallelism, Megatron, XLA, MPS, DataParallel over several GPUs, optimizers
            that run inside the backward pass, several processes that no wrapper connects, and nothing to train; or
            for a private name that the engine needs and the installed libraries lack.
    """
    _refuse_accelerator(trainer)
    if getattr(trainer.accelerator, "deepspeed_engine_wrapped", None) is not None:
        from passk_guard.mitigation.engines.deepspeed.choose import deepspeed_engine

        return deepspeed_engine(trainer)
    wrapped = _uncompiled(trainer.model_wrapped)
    modules = list(wrapped.modules())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise _refused("FSDP1 (FullyShardedDataParallel)", "Set fsdp_version: 2 in the accelerate config.")
    if isinstance(wrapped, DataParallel):
        raise _refused("DataParallel over several GPUs", "Start one process a GPU with torchrun or accelerate launch.")
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    if not parameters:
        raise _refused("a model without a trainable parameter", "Train with requires_grad on what is to be trained.")
    if any(isinstance(module, FSDPModule) for module in modules):
        _check_mesh(parameters)
        return ShardedEngine(trainer, wrapped)
    _refuse_placement(wrapped, parameters)
    _refuse_layerwise_optimizer(trainer, parameters)
    if isinstance(wrapped, DistributedDataParallel):
        return NativeEngine(trainer, wrapped.module, wrapped.process_group)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise _refused(
            f"{dist.get_world_size()} processes around a bare {type(wrapped).__name__}, which nothing keeps in step",
            "Let the Trainer wrap the model (DistributedDataParallel, FSDP2 or DeepSpeed).",
        )
    return NativeEngine(trainer, wrapped)


def _refused(found: str, instead: str) -> GuardError:
    return GuardError(f"Changing the gradient is not supported with {found}. {instead} Or leave mitigation off.")


def _refuse_accelerator(trainer: Any) -> None:
    """Kinds of training that are visible on the accelerator, whatever holds the model."""
    accelerator = getattr(trainer, "accelerator", None)
    if accelerator is None:
        raise GuardError(
            f"Expected a transformers Trainer with an `accelerator`; found {type(trainer).__name__}. In your own loop, "
            "call `passk_guard.mitigation.project_gradient` before the optimizer step."
        )
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in _KINDS:
        raise _refused(_KINDS[kind], "Use DistributedDataParallel, FSDP2 or DeepSpeed.")
    if kind == "DEEPSPEED":
        DEEPSPEED_NEEDS.check(accelerator)
    if accelerator.device.type == "mps":
        raise _refused("the MPS device, which has no float64", "Train on CUDA or CPU.")
    parallelism = getattr(accelerator, "parallelism_config", None)
    for short, name in _PARALLEL.items():
        if getattr(parallelism, f"{short}_enabled", False):
            raise _refused(f"{name} parallelism ({short}_size > 1)", f"Set {short}_size to 1.")


def _refuse_placement(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """One replica of the model that is spread over several devices or processes."""
    if any(getattr(m, "tp_size", None) not in (None, 1) for m in model.modules() if hasattr(m, "config")):
        raise _refused("tensor or expert parallelism (the model was loaded with a tp_plan)", "Load it without one.")
    if any(isinstance(p, DTensor) for p in parameters):
        raise _refused("trained DTensors that FSDP2 does not manage (tensor parallelism)", "Load without a tp_plan.")
    devices = sorted({str(p.device) for p in parameters})
    if len(devices) > 1:
        raise _refused(
            f"a model over the devices {', '.join(devices)} (pipeline parallelism)", "Load it without a device_map."
        )


def _refuse_layerwise_optimizer(trainer: Any, parameters: list[nn.Parameter]) -> None:
    """Parameters that are updated during the backward pass: no whole gradient ever exists."""
    hooked = any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters)
    if hooked or getattr(trainer.accelerator, "has_lomo_optimizer", False):
        raise _refused(
            "an optimizer that runs inside the backward pass (LOMO, AdaLomo, a *_layerwise optimizer)",
            "Use an optimizer that steps after it, such as optim='adamw_torch'.",
        )


def _uncompiled(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper."""
    if type(model).__name__ == COMPILED_NEEDS.owner:
        COMPILED_NEEDS.check(model)
    return getattr(model, "_orig_mod", model)


def _check_mesh(parameters: list[nn.Parameter]) -> None:
    shards = [p for p in parameters if isinstance(p, DTensor)]
    if len(shards) < len(parameters):
        raise _refused(
            f"FSDP2 with {len(parameters) - len(shards)} trained parameters outside of fully_shard",
            "Apply fully_shard to the whole model, or freeze the parameters it ignores.",
        )
    mesh = shards[0].device_mesh
    if mesh.ndim != 1 or any(p.device_mesh != mesh or not isinstance(p.placements[0], Shard) for p in shards):
        raise _refused(
            f"FSDP2 on the device mesh {mesh}, placed as {shards[0].placements}",
            "Use one mesh of one dimension: no HSDP, no tensor or expert parallelism on top.",
        )
