"""Random projections of one side of a weight gradient, x [..., n] -> [..., width], with E[P P^T] = 1."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from passk_guard.sketch.random_signs import random_signs

_CHUNK = 1 << 20  # scalars hashed at a time: stays in cache, and never a second copy of all logits


class Side(ABC):
    """One factor P [n, width] up to `scale`, which is applied to the product at full precision."""

    scale: float

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x P / scale."""

    @abstractmethod
    def rows(self, indices: Tensor) -> Tensor:
        """Rows of P / scale, [..., width]: what one-hot vectors project onto."""


@dataclass(frozen=True)
class DenseSide(Side):
    """Independent signs over sqrt(width): one matrix product. The signs themselves are exact in bf16."""

    signs: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.signs

    def rows(self, indices: Tensor) -> Tensor:
        return self.signs[indices]


@dataclass(frozen=True)
class HashedSide(Side):
    """One signed entry per row of P, at most ceil(n / width) in each column: the variance of dense signs.

    With n <= width nothing collides, and P is an isometry. With a vocabulary on this side the cost does not
    grow with the width, where a matrix product's would.
    """

    source: Tensor  # [m] int64, m = width * ceil(n / width): which coordinate goes to place p, column p % width
    place: Tensor  # [n] int64, the inverse
    signs: Tensor  # [n]
    width: int
    scale: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = flat.new_empty(len(flat), self.width)
        step = max(1, _CHUNK // len(self.source))
        for part, into in zip(flat.split(step), out.split(step), strict=True):
            placed = pad(part * self.signs, (0, len(self.source) - len(self.signs))).index_select(1, self.source)
            torch.sum(placed.view(len(part), -1, self.width), 1, out=into)
        return out.view(*x.shape[:-1], self.width)

    def rows(self, indices: Tensor) -> Tensor:
        empty = self.signs.new_zeros(*indices.shape, self.width)
        return empty.scatter_(-1, self.column(indices)[..., None], self.signs[indices][..., None])

    def column(self, indices: Tensor) -> Tensor:
        """The column in which a row of P has its entry."""
        return self.place[indices] % self.width


def draw_side(size: int, width: int, hashed: bool, generator: torch.Generator, like: Tensor) -> Side:
    """Draw P [size, width] on the CPU and put it where `like` is, in its dtype."""
    if not hashed and size > width:
        return DenseSide(random_signs((size, width), generator).to(like), width**-0.5)
    source = torch.randperm(width * -(-size // width), generator=generator)
    signs = random_signs((size,), generator).to(like)
    return HashedSide(source.to(like.device), source.argsort()[:size].to(like.device), signs, width)
