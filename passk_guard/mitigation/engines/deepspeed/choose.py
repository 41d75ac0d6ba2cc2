"""Choosing how to reach the gradient in a DeepSpeed engine, or refusing one whose edit was never measured."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch

from passk_guard.mitigation.engines.deepspeed.base import DeepSpeedGradient
from passk_guard.mitigation.engines.deepspeed.stages import Bf16, Zero0, Zero3, Zero3Offload, Zero12, Zero12Offload
from passk_guard.utils.errors import GuardError
from passk_guard.utils.private_api import REWEIGHT, installed, requires

TESTED = "0.19.8"
_AUTOCAST = "Use bf16, or DeepSpeed's own fp16."
INSTEAD = "Use ZeRO-0 (fp32), 1, 2 or 3 with data parallelism alone, or mitigate by `reweight`."
WRAPPER_NEEDS = requires(
    "accelerate",
    "DeepSpeedEngineWrapper",
    "projecting gradients under DeepSpeed",
    REWEIGHT,
    engine="the DeepSpeed engine",
)


def _on_nvme(offload: Any) -> bool:
    device = getattr(offload, "device", None)
    return str(getattr(device, "value", device)) == "nvme"


_REFUSED: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    ("pipeline_parallelism", bool, "pipeline parallelism", ""),
    ("mpu", lambda mpu: mpu is not None, "tensor or sequence parallelism (an mpu)", ""),
    ("autotp_size", lambda size: size > 1, "tensor parallelism (autotp_size={})", ""),
    ("has_moe_layers", bool, "a mixture of experts", ""),
    ("zero_hpz_partition_size", lambda size: size > 1, "hpZ (zero_hpz_partition_size={})", "Set it to 1."),
    ("zero_quantized_weights", bool, "ZeRO++ (zero_quantized_weights)", "Set it to false."),
    ("zero_quantized_gradients", bool, "ZeRO++ (zero_quantized_gradients)", "Set it to false."),
    ("zero_quantized_nontrainable_weights", bool, "ZeRO++ (zero_quantized_nontrainable_weights)", "Set it to false."),
    ("zero_offload_optimizer", _on_nvme, "NVMe offload (offload_optimizer)", "Offload to cpu."),
    ("zero_offload_param", _on_nvme, "NVMe offload (offload_param)", "Offload to cpu."),
    ("zero_partial_offload", lambda ratio: ratio != 1, "partial optimizer offload (ratio={})", "Set its ratio to 1."),
    ("zenflow", bool, "ZenFlow", "Use plain optimizer offload."),
    ("is_deepcompile_enabled", bool, "DeepCompile", "Set compile.deepcompile to false."),
    (
        "gradient_average",
        operator.not_,
        "gradients summed over ranks (gradient_allreduce_op)",
        "Use the default, mean.",
    ),
    ("enable_backward_allreduce", operator.not_, "an optimizer which communicates by itself", "Use AdamW."),
    ("torch_autocast_z0_gradscaler", lambda scaler: scaler is not None, "torch autocast in fp16", _AUTOCAST),
)
"""Setting of an engine, whether its value is refused, what it is, and what to do instead."""
SETTINGS_NEEDS = requires(
    "deepspeed",
    "DeepSpeedEngine",
    "projecting gradients under DeepSpeed",
    REWEIGHT,
    **dict.fromkeys([row[0] for row in _REFUSED], "what was never measured is refused"),
)


def deepspeed_engine(trainer: Any) -> DeepSpeedGradient:
    """The `GradientEngine` of a trainer that runs under DeepSpeed: ZeRO-0 to ZeRO-3, BF16_Optimizer, CPU offload.

    Args:
        trainer: a transformers or TRL trainer, in `on_train_begin` or later: before that there is no engine. Anything
            with `accelerator.deepspeed_engine_wrapped.engine` will do.

    Raises:
        GuardError: there is no DeepSpeed engine yet, or its configuration is one in which editing gradients was not
            measured to be exact, with what to use instead. Refused are pipeline, tensor and sequence parallelism,
            mixtures of experts, ZeRO++ and hpZ, NVMe offload, partial offload, ZenFlow, DeepCompile, Muon, optimizers
            that communicate by themselves (1-bit Adam), low-precision master weights, torch autocast with a gradient
            scaler, summed gradients, and unmanaged accumulation.
    """
    wrapped = getattr(trainer.accelerator, "deepspeed_engine_wrapped", None)
    if wrapped is None:
        raise GuardError(
            "Expected a trainer with a DeepSpeed engine; found accelerator.deepspeed_engine_wrapped=None. The engine "
            "is built when training begins: ask for it in on_train_begin, under a DeepSpeed config."
        )
    WRAPPER_NEEDS.check(wrapped)
    engine = wrapped.engine
    DeepSpeedGradient.engine_needs.check(engine)
    SETTINGS_NEEDS.check(engine)
    for found, instead in _objections(engine, engine.optimizer):
        raise GuardError(
            f"Editing gradients under DeepSpeed is not supported with {found}. {instead or INSTEAD} "
            f"Tested with deepspeed {TESTED}; found {installed('deepspeed')}."
        )
    return _kind(engine.optimizer)(engine)


def _objections(engine: Any, optimizer: Any) -> Iterable[tuple[str, str]]:
    for name, refused, found, instead in _REFUSED:
        if refused(value := _ask(engine, name)):
            yield found.format(value), instead
    if hasattr(engine, "managed_gradient_accumulation") and not _ask(engine, "managed_gradient_accumulation"):
        yield "managed_gradient_accumulation=false", "Leave it at true."  # older engines always manage it
    if getattr(optimizer, "sequence_parallel_size", 1) > 1:
        yield "sequence parallelism", ""
    if getattr(optimizer, "zenflow", False):
        yield "ZenFlow", "Use plain optimizer offload."
    inner = getattr(optimizer, "optimizer", optimizer)
    if "muon" in type(inner).__name__.lower():
        yield f"Muon ({type(inner).__name__})", "Use AdamW."
    if getattr(optimizer, "master_weights_and_grads_dtype", torch.float32) != torch.float32:
        yield f"master weights in {optimizer.master_weights_and_grads_dtype}", "Keep master weights in fp32."
    if getattr(optimizer, "torch_autocast_gradscaler", None) is not None:
        yield "torch autocast in fp16", _AUTOCAST


def _ask(engine: Any, name: str) -> Any:
    """DeepSpeed answers some questions by a method and some by an attribute, and versions differ in which."""
    value = getattr(engine, name)
    return value() if callable(value) else value


def _kind(optimizer: Any) -> type[DeepSpeedGradient]:
    """Class of engine by class of optimizer, compared by name: importing DeepSpeed builds extensions."""
    name = type(optimizer).__name__
    if name == Zero12.needs.owner:
        Zero12.needs.check(optimizer)
        return Zero12Offload if optimizer.cpu_offload else Zero12
    if name == Zero3.needs.owner:
        Zero3.needs.check(optimizer)
        return Zero3Offload if optimizer.offload_optimizer else Zero3
    if name == Bf16.needs.owner:
        return Bf16
    if name in ("FP16_Optimizer", "FP16_UnfusedOptimizer"):
        raise GuardError(
            f"Editing gradients under DeepSpeed is not supported with ZeRO-0 in half precision ({name}), where "
            "DeepSpeed 0.19.8 loses most of the update by itself. Set zero_optimization.stage to 1 or more."
        )
    if isinstance(optimizer, torch.optim.Optimizer):
        return Zero0
    raise GuardError(
        f"Expected one of DeepSpeed's optimizers DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3 and "
        f"BF16_Optimizer, or torch's own at ZeRO-0; found {name}. {INSTEAD} Tested with deepspeed {TESTED}."
    )
