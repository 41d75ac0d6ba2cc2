"""Two-sided random projection of every weight gradient into one accumulator, without forming the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from passk_guard.sketch.accumulator import Accumulator
from passk_guard.sketch.random_signs import generator_for, random_buckets, random_signs

_VOCABULARY_RATIO = 8


def split_dim(rows: int, cols: int, dim: int) -> tuple[int, int]:
    """(a, b) with a b = dim: the sizes onto which the two sides of a [rows, cols] weight are projected.

    A side that fits costs no error, so a thin matrix (a LoRA factor) leaves the rest to its long side. The
    vocabulary side of an embedding or a head gets twice the share.
    """
    balanced = max(d for d in range(1, math.isqrt(dim) + 1) if dim % d == 0)
    thin = min(rows, cols)
    if thin < balanced:
        short = min(d for d in range(thin, balanced + 1) if dim % d == 0)
        return (short, dim // short) if rows <= cols else (dim // short, short)
    if rows >= _VOCABULARY_RATIO * cols and balanced % 2 == 0:
        return 2 * (dim // balanced), balanced // 2
    return dim // balanced, balanced


class KroneckerAccumulator(Accumulator):
    """Adds sum_t (P_l^T left_t)(P_r^T right_t)^T of every parameter to one row of `dim` numbers per sample.

    P_l [rows, a] and P_r [cols, b] are independent and zero-mean, E[P P^T] = I, ab = dim, with a pair of its
    own for each parameter. So E<sketch(G), sketch(G')> = <G, G'>, and products across parameters vanish in
    expectation. 1-D parameters are CountSketched into the same row.
    """

    def project(self, name: str, side: str, x: Tensor) -> Tensor:
        key = (name, side, x.dtype, x.device)
        return self.draws.keep(key, lambda: self._draw_side(name, side, x))(x)

    def add_matrix(self, name: str, left: Tensor, right: Tensor) -> None:
        a, b = left.shape[-1], right.shape[-1]
        # The draws are -1 and +1, exact in bf16; their scale 1/sqrt(width) comes in here, at full precision.
        widths = zip(self.shapes[name], (a, b), strict=True)
        scale = math.prod(width**-0.5 for size, width in widths if size > width)
        blocks = self.rows.view(-1, a, b)
        blocks.baddbmm_(left.transpose(1, 2).to(blocks.dtype), right.to(blocks.dtype), alpha=scale)

    def add_rows(self, name: str, indices: Tensor, right: Tensor) -> None:
        key = (name, "table", right.dtype, right.device)
        table = self.draws.keep(key, lambda: self._draw_table(name, right))
        self.add_matrix(name, table[indices], right)

    def add_vector(self, name: str, values: Tensor) -> None:
        key = (name, "vector", values.device)
        buckets, signs = self.draws.keep(key, lambda: self._draw_hash(name, values))
        self.rows.index_add_(1, buckets, values.to(self.rows.dtype) * signs)

    def fold_into(self, sketch: Tensor) -> None:
        for slot, start, end in self.layout.groups:
            sketch[slot] += self.rows[start:end].sum(0)

    def _draw_side(self, name: str, side: str, x: Tensor) -> Callable[[Tensor], Tensor]:
        size, width = x.shape[-1], self._width(name, side)
        generator = generator_for(self.draws.seed, name, side)
        if size <= width:
            signs = random_signs((size,), generator).to(x)
            source = torch.randperm(width, generator=generator).to(x.device)
            return lambda y: torch.nn.functional.pad(y * signs, (0, width - size)).index_select(-1, source)
        matrix = random_signs((size, width), generator).to(x)
        return lambda y: y @ matrix

    def _draw_table(self, name: str, like: Tensor) -> Tensor:
        """P_l itself: row i is the projection of the one-hot vector i. Gathered, never multiplied."""
        size = self.shapes[name][0]
        if size <= self._width(name, "left"):
            return self.project(name, "left", torch.eye(size, dtype=like.dtype, device=like.device))
        generator = generator_for(self.draws.seed, name, "left")
        return random_signs((size, self._width(name, "left")), generator).to(like)

    def _draw_hash(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        generator = generator_for(self.draws.seed, name, "vector")
        buckets = random_buckets(like.shape[-1], self.rows.shape[1], generator)
        return buckets.to(like.device), random_signs((like.shape[-1],), generator).to(like.device)

    def _width(self, name: str, side: str) -> int:
        rows, cols = self.shapes[name]
        return split_dim(rows, cols, self.rows.shape[1])[0 if side == "left" else 1]
