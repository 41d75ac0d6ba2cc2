"""Whether the installed libraries still have what this run will touch, asked once, at train begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from passk_guard.mitigation.objective import PassKObjective
from passk_guard.probe.samplers import Sampler, TRLSampler
from passk_guard.utils.private_api import check, seams


def check_compatibility(trainer: Any, sampler: Sampler | None, *, taps_batch: bool, turns_gradients: bool) -> None:
    """Raise GuardError for a private name that this run needs and the installed libraries lack.

    Reads attributes and changes nothing. Engines check the rest when they are chosen, which is at train begin too.

    Args:
        trainer: whose train() begins.
        sampler: of held-out prompts, if there are any.
        taps_batch: whether the training batch is the probe.
        turns_gradients: whether the guard may look for the engine that holds the gradient.
    """
    check(seams.MODULE, trainer.model)
    check(seams.TENSOR, torch.Tensor)
    check(seams.TRAINER, trainer)
    if (sharded := _sharded_parameter(trainer.model)) is not None:
        check(seams.ZERO3_SHAPE, sharded)
    if (layer := _checkpointing_layer(trainer.model)) is not None:
        check(seams.CHECKPOINTED, layer)
    if isinstance(sampler, TRLSampler):
        check(seams.SAMPLER, sampler.trainer)
    if taps_batch or PassKObjective.of(trainer) is not None:
        check(seams.BATCH, trainer)
    if turns_gradients:
        check(seams.ACCELERATOR, trainer.accelerator)
        kind = trainer.accelerator.distributed_type
        if str(getattr(kind, "value", kind)) == "DEEPSPEED":
            check(seams.LAUNCHED, trainer.accelerator)


def _sharded_parameter(model: nn.Module) -> nn.Parameter | None:
    """One that ZeRO-3 has emptied; it marks its parameters with several names of this kind."""
    emptied = (p for p in model.parameters() if p.requires_grad and not p.numel())
    return next((p for p in emptied if any(name.startswith("ds_") for name in vars(p))), None)


def _checkpointing_layer(model: nn.Module) -> nn.Module | None:
    """A layer of transformers' that checkpoints its activations; it could not do so without the function."""
    return next(
        (
            module
            for module in model.modules()
            if getattr(module, "gradient_checkpointing", False)
            and any(kind.__name__ == seams.CHECKPOINTED.owner for kind in type(module).__mro__)
        ),
        None,
    )
