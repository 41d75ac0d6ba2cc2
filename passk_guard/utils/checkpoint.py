"""Tensors written whole or not at all, and values read back from a checkpoint, each of the kind it was saved as."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from passk_guard.utils.files import replacing

_LARGEST = 2**53


def save_whole(content: Any, path: Path) -> None:
    """`torch.save` under another name, then renamed; on a full disk nothing is left of it, and an older file stays.

    Raises:
        OSError, RuntimeError: it cannot be written; torch reports a full disk as a RuntimeError.
    """
    with replacing(path, path.with_name(path.name + ".partial")) as partial:
        torch.save(content, partial)


def whole(value: Any, least: int = 0) -> int:
    """A whole number of at least `least`. Raises ValueError for anything else, as do the others here."""
    if type(value) is not int or not least <= value <= _LARGEST:
        raise ValueError(f"a whole number of at least {least} was expected")
    return value


def real(value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in [low, high]."""
    if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
        raise ValueError(f"a finite number from {low:g} to {high:g} was expected")
    return float(value)


def listed(value: Any) -> list[Any]:
    """A list or a tuple, as a list."""
    if not isinstance(value, (list, tuple)):
        raise ValueError("a list was expected")
    return list(value)


def mapping(value: Any) -> dict[str, Any]:
    """A mapping from texts."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("a mapping was expected")
    return value


def one_of(value: Any, *allowed: Any) -> Any:
    """One of these texts, or None where it is among them."""
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise ValueError(f"one of {allowed} was expected")
    return value
