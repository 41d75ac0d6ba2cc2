"""A pass that leaves nothing behind: weights frozen, dropout off, checkpointing on, all of it put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from passk_guard.dropout import without_dropout


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Freeze all weights and switch dropout off inside the context; restore everything after it.

    Restored, also after an exception: requires_grad of each parameter, the training flag of each module, the
    attributes that drive gradient checkpointing, and the random state of the CPU and of the model's device.
    """
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(d for d in devices if d is not None)))
        stack.enter_context(_frozen(model))
        stack.enter_context(without_dropout(model))
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    # With no weight requiring grad, autograd never forms a weight gradient: that is where the time goes.
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
