"""Random projections of one side of a weight gradient, x [..., n] -> [..., width], with E[P P^T] = 1."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from passk_guard.sketch.random_signs import random_signs

_LARGEST_MATRIX = 1 << 23  # entries of P that may be written out: 16 MiB in bf16


@dataclass(frozen=True)
class FoldedSide:
    """One signed entry per row of P: x is laid in rows of `width`, signed at random, and the rows are added.

    Coordinate i goes to column (i + shift) mod width, with a sign of its own. The signs alone make E[P P^T] = 1, and
    coordinates collide about n / width to a column as in a random hash, so that the variance is that of dense signs
    wherever large coordinates do not lie a multiple of `width` apart. With n <= width nothing collides, and P is
    an isometry. The cost is that of reading x once: a CPU's matrix product takes ten times as long.

    Attributes:
        signs: [n] of -1 and 1.
        width: number of columns.
        shift: in 0..width-1; a coordinate that is large in every layer then falls into another column in each.
    """

    signs: Tensor
    width: int
    shift: int

    def __call__(self, x: Tensor) -> Tensor:
        """x P, in the dtype of x."""
        low = x.dtype in (torch.bfloat16, torch.float16)
        if (x.is_cuda or low) and len(self.signs) * self.width <= _LARGEST_MATRIX:
            return x @ self._matrix
        flat = x.reshape(-1, x.shape[-1])
        fills = flat.shape[1] >= self.width  # the first round then reaches every column, which need not be zero before
        make = torch.empty if fills else torch.zeros
        out = make(len(flat), self.width, dtype=torch.float32 if low else x.dtype, device=x.device)
        start, column = 0, self.shift
        while start < flat.shape[1]:
            # The second piece of the first round ends where that round does.
            end = self.width if start < self.width else flat.shape[1]
            size = min(self.width - column, end - start, flat.shape[1] - start)
            into, part = out[:, column : column + size], slice(start, start + size)
            if start < self.width:
                torch.mul(flat[:, part], self.signs[part], out=into)
            else:
                into.addcmul_(flat[:, part], self.signs[part])
            start, column = start + size, (column + size) % self.width
        return out.to(x.dtype).view(*x.shape[:-1], self.width)

    def rows(self, indices: Tensor) -> Tensor:
        """Rows of P, [..., width]: what one-hot vectors project onto."""
        empty = self.signs.new_zeros(*indices.shape, self.width)
        return empty.scatter_(-1, self.column(indices)[..., None], self.signs[indices][..., None])

    def column(self, indices: Tensor) -> Tensor:
        """The column in which a row of P has its entry."""
        return (indices + self.shift) % self.width

    @cached_property
    def _matrix(self) -> Tensor:
        """P itself, [n, width]: where a matrix product costs no more than reading x."""
        return self.rows(torch.arange(len(self.signs), device=self.signs.device))


def draw_side(size: int, width: int, generator: torch.Generator, like: Tensor) -> FoldedSide:
    """Draw P [size, width] on the CPU and put it where `like` is, in its dtype."""
    shift = int(torch.randint(width, (1,), generator=generator))
    return FoldedSide(random_signs((size,), generator).to(like), width, shift)
