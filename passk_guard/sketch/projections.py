"""Random projections of one side of a weight gradient, x [..., n] -> [..., width], with E[P P^T] = 1."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Random signs and hashes drawn from a seed and a parameter's name: the same on every rank and device.


def generator_for(seed: int, name: str, part: str) -> torch.Generator:
    """A CPU generator that depends on (seed, name, part) only, and leaves the global ones alone."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{part}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def random_signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent signs -1 or +1 of the given shape, int8, on the CPU."""
    count = 1
    for size in shape:
        count *= size
    # One 64-bit draw gives eight bytes, and the low bit of each is one sign: eight times fewer draws.
    words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(generator=generator)
    return words.view(torch.int8)[:count].bitwise_and_(1).mul_(2).sub_(1).view(shape)


def random_buckets(size: int, dim: int, generator: torch.Generator) -> Tensor:
    """Independent uniform draws from 0..dim-1, [size] int64, on the CPU."""
    return torch.randint(dim, (size,), generator=generator)


# CountSketch of a matrix whose two sides are hashed separately: nothing of the matrix's size is stored.


@dataclass(frozen=True)
class PairHash:
    """Entry (r, c) goes to bucket (h(r) + g(c)) mod dim with sign s(r) z(c) (Pham and Pagh, KDD 2013, degree 2).

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


def draw_pair_hash(shape: tuple[int, int], dim: int, seed: int, name: str, like: Tensor) -> PairHash:
    """Draw on the CPU, and put the result where `like` is; the signs in its dtype."""
    drawn = []
    for part, size in zip(("rows", "cols"), shape, strict=True):
        generator = generator_for(seed, name, part)
        buckets = random_buckets(size, dim, generator)
        drawn += [buckets.to(like.device), random_signs((size,), generator).to(like)]
    return PairHash(dim, *drawn)


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
