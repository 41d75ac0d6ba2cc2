"""Arrangements on which nobody has checked that an edited gradient reaches the optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from passk_guard.utils.errors import GuardError

_KINDS = {"MEGATRON_LM": "Megatron-LM", "XLA": "XLA (TPU)"}
_PARALLEL = {"tp": "tensor", "cp": "context", "sp": "sequence"}


def refused(found: str, instead: str) -> GuardError:
    """The error for an arrangement that is not supported."""
    return GuardError(f"Changing the gradient is not supported with {found}. {instead} Or leave mitigation off.")


def refuse_accelerator(trainer: Any) -> None:
    """Raise GuardError for kinds of training that are visible on the accelerator, whatever holds the model."""
    accelerator = getattr(trainer, "accelerator", None)
    if accelerator is None:
        raise GuardError(
            f"Expected a transformers Trainer with an `accelerator`; found {type(trainer).__name__}. For a loop of "
            "your own, call `passk_guard.mitigation.project_gradient` before the optimizer step."
        )
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in _KINDS:
        raise refused(_KINDS[kind], "Use DistributedDataParallel, FSDP2 or DeepSpeed.")
    if accelerator.device.type == "mps":
        raise refused("the MPS device, which has no float64", "Train on CUDA or CPU.")
    parallelism = getattr(accelerator, "parallelism_config", None)
    for short, name in _PARALLEL.items():
        if getattr(parallelism, f"{short}_enabled", False):
            raise refused(f"{name} parallelism ({short}_size > 1)", f"Set {short}_size to 1.")


def refuse_placement(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Raise GuardError where one replica of the model is spread over several devices or processes."""
    if any(getattr(m, "tp_size", None) not in (None, 1) for m in model.modules() if hasattr(m, "config")):
        raise refused("tensor or expert parallelism (the model was loaded with a tp_plan)", "Load it without one.")
    if any(isinstance(p, DTensor) for p in parameters):
        raise refused("trained DTensors that FSDP2 does not manage (tensor parallelism)", "Load without a tp_plan.")
    devices = sorted({str(p.device) for p in parameters})
    if len(devices) > 1:
        raise refused(
            f"a model over the devices {', '.join(devices)} (pipeline parallelism)", "Load it without a device_map."
        )


def refuse_layerwise_optimizer(trainer: Any, parameters: list[nn.Parameter]) -> None:
    """Raise GuardError when parameters are updated during the backward pass: no whole gradient ever exists."""
    hooked = any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters)
    if hooked or getattr(trainer.accelerator, "has_lomo_optimizer", False):
        raise refused(
            "an optimizer that runs inside the backward pass (LOMO, AdaLomo, a *_layerwise optimizer)",
            "Use an optimizer that steps after it, such as optim='adamw_torch'.",
        )
