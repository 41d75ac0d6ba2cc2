"""Choosing how to reach the gradient in a DeepSpeed engine, by what its optimizer is."""

from __future__ import annotations

from typing import Any

import torch

from passk_guard.engines.deepspeed_base import DeepSpeedGradient
from passk_guard.engines.deepspeed_bf16 import Bf16
from passk_guard.engines.deepspeed_offload import Zero3Offload, Zero12Offload
from passk_guard.engines.deepspeed_support import INSTEAD, TESTED, check_supported
from passk_guard.engines.deepspeed_zero0 import Zero0
from passk_guard.engines.deepspeed_zero3 import Zero3
from passk_guard.engines.deepspeed_zero12 import Zero12
from passk_guard.utils.errors import GuardError
from passk_guard.utils.private_api import check, seams


def deepspeed_engine(trainer: Any) -> DeepSpeedGradient:
    """The `GradientEngine` of a trainer that runs under DeepSpeed: ZeRO-0 to ZeRO-3, BF16_Optimizer, CPU offload.

    Args:
        trainer: a transformers or TRL trainer, in `on_train_begin` or later: before that there is no engine. Anything
            with `accelerator.deepspeed_engine_wrapped.engine` will do.

    Raises:
        GuardError: there is no DeepSpeed engine yet, or its configuration is one in which editing gradients was not
            measured to be exact; the message says which, and what to use instead.
    """
    wrapped = getattr(trainer.accelerator, "deepspeed_engine_wrapped", None)
    if wrapped is None:
        raise GuardError(
            "Expected a trainer with a DeepSpeed engine; found accelerator.deepspeed_engine_wrapped=None. The engine "
            "is built when training begins: ask for it in on_train_begin, under a DeepSpeed config."
        )
    check(seams.LAUNCHER, wrapped)
    engine = wrapped.engine
    check(seams.ENGINE, engine)
    check(seams.SETTINGS, engine)
    check_supported(engine)
    return _kind(engine.optimizer)(engine)


def _kind(optimizer: Any) -> type[DeepSpeedGradient]:
    """Class of engine by class of optimizer, compared by name: importing DeepSpeed builds extensions."""
    name = type(optimizer).__name__
    if name == "DeepSpeedZeroOptimizer":
        check(seams.ZERO12, optimizer)
        return Zero12Offload if optimizer.cpu_offload else Zero12
    if name == "DeepSpeedZeroOptimizer_Stage3":
        check(seams.ZERO3, optimizer)
        return Zero3Offload if optimizer.offload_optimizer else Zero3
    if name == "BF16_Optimizer":
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
