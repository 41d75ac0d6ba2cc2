"""Random projections: a folded projection of one side of a weight gradient, and a hash of both sides.

They depend on a seed and the name of a parameter only, and are the same on every rank and device.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_LARGEST_MATRIX = 1 << 23  # entries of P that may be written out: 16 MiB in bf16


def generator_for(seed: int, name: str, part: str) -> torch.Generator:
    """A CPU generator that depends on (seed, name, part) only, and leaves the global ones alone."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{part}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def random_signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent signs -1 or +1 of the given shape, int8, on the CPU."""
    count = math.prod(shape)
    # A random 64-bit word gives eight bytes, and the low bit of each is one sign.
    words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(generator=generator)
    return words.view(torch.int8)[:count].bitwise_and_(1).mul_(2).sub_(1).view(shape)


def random_buckets(size: int, dim: int, generator: torch.Generator) -> Tensor:
    """Independent uniform numbers from 0..dim-1, [size] int64, on the CPU."""
    return torch.randint(dim, (size,), generator=generator)


@dataclass(frozen=True)
class PairHash:
    """CountSketch of a matrix whose two sides are hashed separately, so that nothing of the matrix's size is stored.

    Entry (r, c) goes to bucket (h(r) + g(c)) mod dim with sign s(r) z(c) (Pham and Pagh, KDD 2013, degree 2).

    Attributes:
        dim: number of buckets.
        row_buckets, row_signs: h and s, [rows].
        col_buckets, col_signs: g and z, [cols].
    """

    dim: int
    row_buckets: Tensor
    row_signs: Tensor
    col_buckets: Tensor
    col_signs: Tensor

    def places(self, rows: Tensor) -> Tensor:
        """Buckets [R, cols] of the given rows."""
        return (self.row_buckets[rows][:, None] + self.col_buckets).remainder_(self.dim)

    def signs(self, rows: Tensor) -> Tensor:
        """Signs [R, cols] of the given rows."""
        return self.row_signs[rows][:, None] * self.col_signs


def sample_pair_hash(shape: tuple[int, int], dim: int, seed: int, name: str, like: Tensor) -> PairHash:
    """Sample on the CPU, and put the result on the device of `like`, the signs in its dtype."""
    sides = []
    for part, size in zip(("rows", "cols"), shape, strict=True):
        generator = generator_for(seed, name, part)
        buckets = random_buckets(size, dim, generator)
        sides += [buckets.to(like.device), random_signs((size,), generator).to(like)]
    return PairHash(dim, *sides)


@dataclass(frozen=True)
class FoldedSide:
    """P [n, width] with one signed entry per row: x is cut into rows of `width`, signed at random and added up.

    Coordinate i goes to column (i + shift) mod width with an independent sign, so that E[P P^T] = 1. About n / width
    coordinates share a column, as in a random hash. The variance is that of dense signs unless large coordinates are a
    multiple of `width` apart. With n <= width there are no collisions, and P is an isometry. The cost is that of
    reading x once, a tenth of a matrix product on a CPU.

    Attributes:
        signs: [n] of -1 and 1.
        width: number of columns.
        shift: in 0..width-1, so that a coordinate that is large in every layer is in another column in each.
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
        fills = flat.shape[1] >= self.width  # the first round then writes every column
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
        """Rows of P, [..., width]: the projections of one-hot vectors."""
        empty = self.signs.new_zeros(*indices.shape, self.width)
        return empty.scatter_(-1, self.column(indices)[..., None], self.signs[indices][..., None])

    def column(self, indices: Tensor) -> Tensor:
        """The column in which a row of P has its entry."""
        return (indices + self.shift) % self.width

    @cached_property
    def _matrix(self) -> Tensor:
        """P [n, width], used where a matrix product costs no more than reading x."""
        return self.rows(torch.arange(len(self.signs), device=self.signs.device))


def sample_side(size: int, width: int, generator: torch.Generator, like: Tensor) -> FoldedSide:
    """Sample P [size, width] on the CPU and put it on the device of `like`, in its dtype."""
    shift = int(torch.randint(width, (1,), generator=generator))
    return FoldedSide(random_signs((size,), generator).to(like), width, shift)
