"""Backward passes of a probe loss through a DeepSpeed engine, as one accumulation window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passk_guard.engines.protocol import Batch
from passk_guard.utils.errors import GuardError, VoidRefresh

Loss = Callable[[nn.Module, Batch], Tensor]


def accumulate(engine: Any, batches: Sequence[Batch], loss: Loss[Batch], on_any_rank: Callable[[bool], bool]) -> None:
    """Leave in `engine` the gradient of the sum over batches of loss(engine, batch), times its loss scale.

    Forwards go through the engine: under ZeRO-3 it counts micro-batches there, and a forward through `engine.module`
    would overwrite what the batches before have left. Reduced over ranks at the latest with the last batch.

    Args:
        on_any_rank: whether something is true on any rank, collectively.

    Raises:
        Whatever `loss` raises; GuardError where it is no scalar with a gradient; VoidRefresh where it raised on another
        rank, which would otherwise leave this one waiting in backward.
    """
    for index, batch in enumerate(batches):
        engine.set_gradient_accumulation_boundary(is_boundary=index == len(batches) - 1)
        engine.backward(_agreed(engine, batch, loss, on_any_rank), scale_wrt_gas=False)


def _agreed(engine: Any, batch: Batch, loss: Loss[Batch], on_any_rank: Callable[[bool], bool]) -> Tensor:
    try:
        with torch.enable_grad():
            value = loss(engine, batch)
        if value.numel() != 1 or not value.requires_grad:
            raise GuardError(
                "Expected `loss` to return a scalar that depends on the trained parameters; found shape "
                f"{tuple(value.shape)}, requires_grad={value.requires_grad}."
            )
    except Exception:
        on_any_rank(True)
        raise
    if on_any_rank(False):
        raise VoidRefresh("the probe loss failed on another rank")
    return value
