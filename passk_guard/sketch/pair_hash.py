"""CountSketch of a matrix whose two sides are hashed separately: nothing of the matrix's size is stored."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from passk_guard.sketch.random_signs import generator_for, random_buckets, random_signs


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
