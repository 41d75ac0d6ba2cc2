"""Buffers of an engine that a probe borrows: their contents come back, and the result needs no copy of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 1 << 22
"""Elements held aside at a time."""


@torch.no_grad()
def swap_(left: Tensor, right: Tensor) -> None:
    """Exchange the contents of two tensors of one shape and dtype, block by block."""
    for x, y in zip(left.view(-1).split(_BLOCK), right.view(-1).split(_BLOCK), strict=True):
        held = x.clone()
        x.copy_(y)
        y.copy_(held)


class Lent:
    """Persistent buffers of an engine that a probe writes into, and that get their contents back.

    One copy is made, of what the buffers held; `take` exchanges the two, so that the copy becomes the result.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = list(buffers)
        self._copies = [buffer.detach().clone() for buffer in self._buffers]
        self._taken = False

    def take(self) -> list[Tensor]:
        """What the buffers hold now, in storage of its own; the buffers hold again what they did at first."""
        for buffer, copy in zip(self._buffers, self._copies, strict=True):
            swap_(buffer, copy)
        self._taken = True
        return self._copies

    @torch.no_grad()
    def restore(self) -> None:
        """Give the buffers their contents back, unless `take` has."""
        if not self._taken:
            for buffer, copy in zip(self._buffers, self._copies, strict=True):
                buffer.copy_(copy)
