"""Two-sided random projection of every weight gradient into one accumulator, without forming the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from passk_guard.sketch.accumulator import Accumulator, Span, matrix_shape
from passk_guard.sketch.projections import (
    FoldedSide,
    PairHash,
    generator_for,
    random_buckets,
    random_signs,
    sample_pair_hash,
    sample_side,
)

_VOCABULARY_RATIO = 6  # rows per column: more than any MLP in use has, less than embeddings and heads have
_VOCABULARY_ROOM = 32  # times as many rows as a balanced split has; folded into `dim` afterwards


def split_dim(rows: int, cols: int, dim: int) -> tuple[int, int]:
    """(a, b): the sizes onto which the two sides of a [rows, cols] weight are projected; a b = dim, or more.

    A side that fits adds no error, so that the long side of a thin matrix (a LoRA factor) gets the rest. For an
    embedding or a head a b > dim, and the result is hashed into `dim`: the gradients of different samples are similar
    there, and with a b = dim that one weight would dominate the error of the whole sketch.
    """
    balanced = max(d for d in range(1, math.isqrt(dim) + 1) if dim % d == 0)
    thin = min(rows, cols)
    if thin < balanced:
        short = min(d for d in range(thin, balanced + 1) if dim % d == 0)
        return (short, dim // short) if rows <= cols else (dim // short, short)
    if is_vocabulary(rows, cols):
        return dim // balanced * _VOCABULARY_ROOM, balanced
    return dim // balanced, balanced


def is_vocabulary(rows: int, cols: int) -> bool:
    """Whether a [rows, cols] weight looks like an embedding or a head."""
    return rows >= _VOCABULARY_RATIO * cols


class KroneckerAccumulator(Accumulator):
    """Adds sum_t (P_l^T left_t)(P_r^T right_t)^T of every parameter to one row of `dim` numbers per group.

    P_l [rows, a] and P_r [cols, b] are independent and zero-mean with E[P P^T] = 1, a separate pair for each
    parameter, and ab = dim. For a vocabulary ab > dim, and the product is CountSketched. So
    E<sketch(G), sketch(G')> = <G, G'>, and products across parameters vanish in expectation. 1-D parameters are
    CountSketched into the same row.
    """

    def project(self, name: str, side: str, x: Tensor) -> Tensor:
        return self._side(name, side, x)(x)

    def narrows(self, name: str, side: str) -> bool:
        which, sizes = ("left", "right").index(side), matrix_shape(self.shapes[name])
        return split_dim(*sizes, self.rows.shape[1])[which] < sizes[which]

    def add_matrix(self, name: str, left: Tensor, right: Tensor) -> None:
        a, b, groups = left.shape[-1], right.shape[-1], self.layout.groups
        if a * b <= self.rows.shape[1] and len({end - start for _, start, end in groups}) == 1:
            # Adjacent groups of one size need one call for all.
            first, blocks, many = groups[0][1], self.rows.view(-1, a, b), len(self.rows)
            even_left, even_right = (x[first:].reshape(many, -1, x.shape[-1]).to(blocks.dtype) for x in (left, right))
            blocks.baddbmm_(even_left.transpose(1, 2), even_right)
            return
        self.add_tokens(name, left.flatten(0, 1), right.flatten(0, 1), self.spans(left.shape[1]))

    def add_tokens(self, name: str, left: Tensor, right: Tensor, spans: Sequence[Span]) -> None:
        a, b, dim = left.shape[-1], right.shape[-1], self.rows.shape[1]
        places, signs = self._folded(name, a, right) if a * b > dim else (None, None)
        for group, start, end in spans:
            row = self.rows[group]
            wide_left, wide_right = (x[start:end].to(row.dtype) for x in (left, right))
            if places is None or signs is None:
                row.view(a, b).addmm_(wide_left.t(), wide_right)
            else:
                row.scatter_add_(0, places, (wide_left.t() @ wide_right).mul_(signs).flatten())

    def _folded(self, name: str, width: int, right: Tensor) -> tuple[Tensor, Tensor]:
        """Places [a b] in a row for the projected gradient [a, b] of a vocabulary, and signs [a, b]."""

        def sample() -> tuple[Tensor, Tensor]:
            pair, every = self._pair_hash(name, width, right), torch.arange(width, device=right.device)
            return pair.places(every).flatten(), pair.signs(every)

        return self.projections.keep((name, "folded", right.device), sample)

    def add_rows(self, name: str, indices: Tensor, right: Tensor) -> None:
        side = self._side(name, "left", right)
        if side.width * right.shape[-1] <= self.rows.shape[1]:
            self.add_matrix(name, side.rows(indices), right)
            return
        for row, (_, start, end) in enumerate(self.layout.groups):
            self._scatter(row, name, side, indices[start:end].flatten(), right[start:end].flatten(0, 1))

    def add_gradient(self, name: str, group: int, gradient: Tensor) -> None:
        if gradient.dim() < 2:
            buckets, signs = self._vector_hash(name, gradient.reshape(-1))
            self.rows[group].index_add_(0, buckets, gradient.reshape(-1).to(self.rows.dtype) * signs)
            return
        right = self.project(name, "right", gradient.reshape(matrix_shape(gradient.shape))).to(self.rows.dtype)
        side = self._side(name, "left", right)
        if side.width * right.shape[1] <= self.rows.shape[1]:
            self.rows[group] += side(right.t()).t().flatten()
        else:
            self._scatter(group, name, side, torch.arange(len(right), device=right.device), right)

    def _scatter(self, group: int, name: str, side: FoldedSide, indices: Tensor, right: Tensor) -> None:
        """Add sum_i e_{indices[i]} right[i]^T: each i fills one row of [a, b] only, and needs no product."""
        pair, column = self._pair_hash(name, side.width, right), side.column(indices)
        signs = pair.signs(column) * side.signs[indices][:, None]
        self.rows[group].scatter_add_(0, pair.places(column).flatten(), (right.to(signs.dtype) * signs).flatten())

    def add_vector(self, name: str, values: Tensor) -> None:
        if not self.layout.groups:
            return
        buckets, signs = self._vector_hash(name, values)
        summed = torch.stack([values[start:end].sum(0, dtype=self.rows.dtype) for _, start, end in self.layout.groups])
        self.rows.index_add_(1, buckets, summed * signs)

    def _side(self, name: str, side: str, like: Tensor) -> FoldedSide:
        def sample() -> FoldedSide:
            which, sizes, seed = ("left", "right").index(side), matrix_shape(self.shapes[name]), self.projections.seed
            widths = split_dim(sizes[0], sizes[1], self.rows.shape[1])
            return sample_side(sizes[which], widths[which], generator_for(seed, name, side), like)

        return self.projections.keep((name, side, like.dtype, like.device), sample)

    def _pair_hash(self, name: str, width: int, right: Tensor) -> PairHash:
        shape, dim, seed = (width, right.shape[-1]), self.rows.shape[1], self.projections.seed
        key = (name, "fold", right.device)
        return self.projections.keep(key, lambda: sample_pair_hash(shape, dim, seed, f"{name}/fold", self.rows))

    def _vector_hash(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        def sample() -> tuple[Tensor, Tensor]:
            generator = generator_for(self.projections.seed, name, "vector")
            buckets = random_buckets(like.shape[-1], self.rows.shape[1], generator)
            return buckets.to(like.device), random_signs((like.shape[-1],), generator).to(like.device)

        return self.projections.keep((name, "vector", like.device), sample)
