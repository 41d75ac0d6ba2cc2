"""Form each layer's gradient once per slot, and copy it (identity) or hash it (countsketch)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from passk_guard.sketch.accumulator import Accumulator, Span
from passk_guard.sketch.projections import sample_pair_hash

_CHUNK = 1 << 22  # scalars of a weight gradient formed at a time: bounds memory for a vocabulary matrix


class ExactAccumulator(Accumulator):
    """Forms G_s = sum_{i in slot s} sum_t left_t right_t^T some rows at a time, and adds it where `deposit` says."""

    @abstractmethod
    def deposit(self, name: str, rows: Tensor, cols: int) -> tuple[Tensor, Tensor | None]:
        """For entries [rows, 0..cols-1] of a weight: places [R, cols] in a row of the sketch, and signs or None."""

    def project(self, name: str, side: str, x: Tensor) -> Tensor:
        return x

    def add_matrix(self, name: str, left: Tensor, right: Tensor) -> None:
        self.add_tokens(name, left.flatten(0, 1), right.flatten(0, 1), self.spans(left.shape[1]))

    def add_tokens(self, name: str, left: Tensor, right: Tensor, spans: Sequence[Span]) -> None:
        height, width = self.shapes[name]
        step = max(1, _CHUNK // width)
        dtype = torch.promote_types(left.dtype, right.dtype)  # they differ under autocast
        for first in range(0, height, step):
            part = torch.arange(first, min(first + step, height), device=left.device)
            places, signs = self.deposit(name, part, width)
            for group, start, end in spans:
                columns = left[start:end, first : first + step].to(dtype)
                self._add(group, columns.t() @ right[start:end].to(dtype), places, signs)

    def add_rows(self, name: str, indices: Tensor, right: Tensor) -> None:
        step = max(1, _CHUNK // right.shape[-1])
        for row, (_, start, end) in enumerate(self.layout.groups):
            looked_up, values = indices[start:end].flatten(), right[start:end].flatten(0, 1)
            for ids, part in zip(looked_up.split(step), values.split(step), strict=True):
                self._add(row, part, *self.deposit(name, ids, part.shape[-1]))

    def add_vector(self, name: str, values: Tensor) -> None:
        places, signs = self.deposit(name, torch.arange(values.shape[-1], device=values.device), 1)
        for row, (_, start, end) in enumerate(self.layout.groups):
            self._add(row, values[start:end].sum(0)[:, None], places, signs)

    def _add(self, row: int, values: Tensor, places: Tensor, signs: Tensor | None) -> None:
        values = values.to(self.rows.dtype)
        values = values if signs is None else values * signs
        self.rows[row].scatter_add_(0, places.flatten(), values.flatten())


class IdentityAccumulator(ExactAccumulator):
    """The flattened gradient itself, parameters one after the other."""

    def deposit(self, name: str, rows: Tensor, cols: int) -> tuple[Tensor, None]:
        starts = self.projections.keep("starts", self._starts)
        return starts[name] + rows[:, None] * cols + torch.arange(cols, device=rows.device), None

    def _starts(self) -> dict[str, int]:
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        return dict(zip(self.shapes, accumulate([0, *sizes[:-1]]), strict=True))


class CountSketchAccumulator(ExactAccumulator):
    """Each entry of the gradient goes to one of `dim` buckets with a random sign."""

    def deposit(self, name: str, rows: Tensor, cols: int) -> tuple[Tensor, Tensor]:
        shape = (self.shapes[name][0], cols)
        seed, dim = self.projections.seed, self.rows.shape[1]
        pair = self.projections.keep((name, rows.device), lambda: sample_pair_hash(shape, dim, seed, name, self.rows))
        return pair.places(rows), pair.signs(rows)
