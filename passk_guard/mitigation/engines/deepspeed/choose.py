"""Choosing how to reach the gradient in a DeepSpeed engine, or refusing one whose edit was never measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from passk_guard.mitigation.engines.deepspeed.base import DeepSpeedGradient
from passk_guard.mitigation.engines.deepspeed.offload import Zero3Offload, Zero12Offload
from passk_guard.mitigation.engines.deepspeed.stages import Bf16, Zero0, Zero3, Zero12
from passk_guard.utils.errors import GuardError
from passk_guard.utils.private_api import REWEIGHT, installed, requires

TESTED = "0.19.8"
INSTEAD = "Use ZeRO-0 (fp32), 1, 2 or 3 with data parallelism alone, or mitigate by `reweight`."
WRAPPER_NEEDS = requires(
    "accelerate",
    "DeepSpeedEngineWrapper",
    "projecting gradients under DeepSpeed",
    REWEIGHT,
    engine="the DeepSpeed engine",
)
_QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
_SETTINGS = (
    *("pipeline_parallelism", "mpu", "autotp_size", "has_moe_layers", "zero_hpz_partition_size", *_QUANTIZED),
    *("zero_offload_optimizer", "zero_offload_param", "zero_partial_offload", "zenflow", "is_deepcompile_enabled"),
    *("gradient_average", "enable_backward_allreduce", "torch_autocast_z0_gradscaler"),
)
SETTINGS_NEEDS = requires(
    "deepspeed",
    "DeepSpeedEngine",
    "projecting gradients under DeepSpeed",
    REWEIGHT,
    **dict.fromkeys(_SETTINGS, "what was never measured is refused"),
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
    def ask(name: str) -> Any:
        """DeepSpeed answers some questions by a method and some by an attribute, and versions differ in which."""
        value = getattr(engine, name)
        return value() if callable(value) else value

    if ask("pipeline_parallelism"):
        yield "pipeline parallelism", ""
    if ask("mpu") is not None or ask("autotp_size") > 1:
        yield "tensor or sequence parallelism (an mpu or autotp_size > 1)", ""
    if getattr(optimizer, "sequence_parallel_size", 1) > 1:
        yield "sequence parallelism", ""
    if ask("has_moe_layers"):
        yield "a mixture of experts", ""
    if (size := ask("zero_hpz_partition_size")) > 1:
        yield f"hpZ (zero_hpz_partition_size={size})", "Set zero_hpz_partition_size to 1."
    for name in _QUANTIZED:
        if ask(name):
            yield f"ZeRO++ ({name})", f"Set {name} to false."
    for name in ("zero_offload_optimizer", "zero_offload_param"):
        device = getattr(ask(name), "device", None)
        if str(getattr(device, "value", device)) == "nvme":
            yield f"NVMe offload ({name.removeprefix('zero_')})", "Offload to cpu."
    if ask("zero_partial_offload") != 1.0:
        yield "partial optimizer offload (ratio below 1)", "Set offload_optimizer.ratio to 1."
    if ask("zenflow") or getattr(optimizer, "zenflow", False):
        yield "ZenFlow", "Use plain optimizer offload."
    if ask("is_deepcompile_enabled"):
        yield "DeepCompile", "Set compile.deepcompile to false."
    if hasattr(engine, "managed_gradient_accumulation") and not ask("managed_gradient_accumulation"):
        yield "managed_gradient_accumulation=false", "Leave it at true."  # older engines always manage it
    if not ask("gradient_average"):
        yield "gradients summed over ranks (gradient_allreduce_op)", "Use the default, mean."
    if not ask("enable_backward_allreduce"):
        yield f"{type(optimizer).__name__}, which communicates by itself", "Use AdamW."
    inner = getattr(optimizer, "optimizer", optimizer)
    if "muon" in type(inner).__name__.lower():
        yield f"Muon ({type(inner).__name__})", "Use AdamW."
    if getattr(optimizer, "master_weights_and_grads_dtype", torch.float32) != torch.float32:
        yield f"master weights in {optimizer.master_weights_and_grads_dtype}", "Keep master weights in fp32."
    for obj, name in ((engine, "torch_autocast_z0_gradscaler"), (optimizer, "torch_autocast_gradscaler")):
        if getattr(obj, name, None) is not None:
            yield "torch autocast in fp16", "Use bf16, or DeepSpeed's own fp16."


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
