"""A forward pass without dropout, which still checkpoints its activations as training does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in every module, but for the flags that make Hugging Face models checkpoint activations.

    Every flag and rate is put back on the way out, also after an exception.
    """
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
