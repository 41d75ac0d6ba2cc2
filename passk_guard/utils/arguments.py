"""Numbers that a caller passes, checked before anything is computed with them. Needs torch alone."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import brief


def as_counts(value: Any, name: str) -> Tensor:
    """A count or a tensor of counts in float64, on its device.

    Raises:
        GuardError: no real numbers, NaN, infinity, or fractions.
    """
    try:
        given = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        given = None
    counts = None if given is None or given.is_complex() else given.to(torch.float64)
    if counts is None or not bool((counts.isfinite() & (counts == counts.floor())).all()):
        raise GuardError(f"Expected `{name}` to be a whole number or a tensor of them; found {brief(value)}.")
    return counts


def as_real(value: Any, name: str) -> float:
    """A real number as a float; infinities and NaN are numbers here, and the caller's bounds decide.

    Raises:
        GuardError: no real number, or a whole one beyond any float.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        if isinstance(value, Real) and not isinstance(value, bool):
            return float(value)
    except OverflowError:
        pass
    raise GuardError(f"Expected `{name}` to be a real number; found {brief(value)}.")


def together(*values: Tensor) -> tuple[Tensor, ...]:
    """The tensors broadcast to one shape.

    Raises:
        GuardError: their shapes do not fit.
    """
    try:
        return tuple(torch.broadcast_tensors(*values))
    except RuntimeError:
        shapes = " and ".join(str(tuple(value.shape)) for value in values)
        raise GuardError(f"Expected shapes that broadcast; found {shapes}.") from None
