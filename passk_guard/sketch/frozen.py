"""A pass that leaves nothing behind: weights frozen, dropout off, checkpointing on, all of it put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


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
        stack.enter_context(_without_dropout(model))
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


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        try:
            for module, training in flags:
                drives = training and bool(getattr(module, "gradient_checkpointing", False))
                module.training = drives  # Hugging Face models checkpoint in train mode only
                if drives:
                    stack.enter_context(_checkpointing_in_eval(module))
            yield
        finally:
            for module, training in flags:
                module.training = training


@contextmanager
def _checkpointing_in_eval(module: nn.Module) -> Iterator[None]:
    """Let `module` checkpoint as in training, while what it checkpoints runs in eval mode.

    A layer that drives its own checkpointing would otherwise apply its functional dropout, in the forward and
    again in the recomputation. Dropout written as plain numbers on the module is zeroed for the same reason.
    """
    rates = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, float) and ("dropout" in name or "layerdrop" in name)
    }
    checkpoint = vars(module).get("_gradient_checkpointing_func")
    vars(module).update(dict.fromkeys(rates, 0.0))
    if checkpoint is not None:
        vars(module)["_gradient_checkpointing_func"] = _checkpoint_in_eval(module, checkpoint)
    try:
        yield
    finally:
        vars(module).update(rates)
        if checkpoint is not None:
            vars(module)["_gradient_checkpointing_func"] = checkpoint


def _checkpoint_in_eval(module: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def in_eval(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            training, module.training = module.training, False
            try:
                return forward(*args, **kwargs)
            finally:
                module.training = training

        return run

    def checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(in_eval(forward), *args, **kwargs)

    return checkpointed
