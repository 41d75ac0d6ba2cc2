"""The state a model is sampled in, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def sampling_mode(model: nn.Module, seed: int) -> Iterator[None]:
    """No dropout, no gradient, no checkpointing, and torch's generators (CPU and the model's device) on `seed`.

    Flags of every module and the generators are put back on exit. Checkpointing is switched by its flag and not
    by transformers' enable and disable, of which each pair leaves one more hook on the input embedding.
    """
    flags = [(m, name, value) for m in model.modules() for name, value in _flags(m).items()]
    device = next(model.parameters()).device
    try:
        for module, name, _ in flags:
            setattr(module, name, False)
        with _forked_generators(device), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            if device.type not in ("cpu", "meta"):
                torch.get_device_module(device).manual_seed(seed)
            yield
    finally:
        for module, name, value in flags:
            setattr(module, name, value)


@contextmanager
def attributes(obj: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes of `obj` for the duration of the body; those it does not have are left out."""
    before = {name: getattr(obj, name) for name in values if hasattr(obj, name)}
    try:
        for name in before:
            setattr(obj, name, values[name])
        yield
    finally:
        for name, value in before.items():
            setattr(obj, name, value)


def _flags(module: nn.Module) -> dict[str, Any]:
    names = ("training", "gradient_checkpointing")
    return {name: vars(module)[name] for name in names if name in vars(module)}


@contextmanager
def _forked_generators(device: torch.device) -> Iterator[None]:
    cpu = torch.get_rng_state()
    module: Any = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    state = None if module is None else module.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if module is not None:
            module.set_rng_state(state)
