"""From layer inputs and output gradients to rows of the sketch: the base class, the exact gradient, and its hash."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from passk_guard.sketch.projections import sample_pair_hash

_CHUNK = 1 << 22  # scalars of a weight gradient formed at a time: bounds memory for a vocabulary matrix
T = TypeVar("T")

Span = tuple[int, int, int]  # group, its first token, one past its last


@dataclass(frozen=True)
class Layout:
    """How the B samples of a batch, sorted by slot, fall into groups.

    Attributes:
        slots: [B] int64 ascending, -1 for samples that are ignored.
        groups: (slot, first sample, one past the last sample) for each slot >= 0 that occurs.
    """

    slots: Tensor
    groups: tuple[tuple[int, int, int], ...]


def lay_out(sorted_slots: Tensor) -> Layout:
    """The groups of an ascending [B] int64 tensor of slots."""
    slots, counts = torch.unique_consecutive(sorted_slots.cpu(), return_counts=True)
    ends = counts.cumsum(0).tolist()
    spans = zip(slots.tolist(), [0, *ends[:-1]], ends, strict=True)
    return Layout(sorted_slots, tuple(span for span in spans if span[0] >= 0))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, cols) of a parameter seen as a matrix: [E, out, in] as [E out, in], and a vector as one column."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


@dataclass
class Projections:
    """The random projections of one seed, sampled once and kept on the device for all batches of a refresh."""

    seed: int
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def keep(self, key: Any, make: Callable[[], T]) -> T:
        """The value made for `key`, made now if this is the first request."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


@dataclass
class Accumulator(ABC):
    """Sums the sketched gradients of one batch. A weight gradient is sum_t left_t right_t^T, in weight layout.

    Attributes:
        rows: [number of groups, dim], one row per group; fp32 or float64.
        layout: the groups.
        shapes: name of each trainable parameter -> its shape.
        projections: shared by all batches of a refresh.
    """

    rows: Tensor
    layout: Layout
    shapes: Mapping[str, tuple[int, ...]]
    projections: Projections

    @abstractmethod
    def project(self, name: str, side: str, x: Tensor) -> Tensor:
        """The projection of x [..., n], the "left" or "right" factor of weight `name`."""

    def narrows(self, name: str, side: str) -> bool:
        """Whether `project` makes a factor of this weight narrower."""
        return False

    @abstractmethod
    def add_matrix(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add sum_t left_t right_t^T of each group's samples, for projected left [B, T, .] and right [B, T, .]."""

    @abstractmethod
    def add_tokens(self, name: str, left: Tensor, right: Tensor, spans: Sequence[Span]) -> None:
        """The same for consecutive tokens of several samples, left [N, .] and right [N, .], groups in spans."""

    @abstractmethod
    def add_rows(self, name: str, indices: Tensor, right: Tensor) -> None:
        """Add the gradient of a lookup: row indices[b, t] of the weight receives projected right[b, t]."""

    @abstractmethod
    def add_vector(self, name: str, values: Tensor) -> None:
        """Add the gradient of a 1-D parameter, values [B, n] per sample."""

    @abstractmethod
    def add_gradient(self, name: str, group: int, gradient: Tensor) -> None:
        """Add the gradient of a parameter of any shape, formed by autograd, to one group."""

    def spans(self, width: int) -> list[Span]:
        """The groups among the B T tokens of a batch of that width."""
        return [(group, start * width, end * width) for group, (_, start, end) in enumerate(self.layout.groups)]

    def fold_into(self, sketch: Tensor) -> None:
        """Add the rows to their slots of sketch [num_slots, dim]."""
        for row, (slot, _, _) in enumerate(self.layout.groups):
            sketch[slot] += self.rows[row]


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

    def add_gradient(self, name: str, group: int, gradient: Tensor) -> None:
        matrix = gradient.reshape(matrix_shape(gradient.shape))
        step = max(1, _CHUNK // matrix.shape[1])
        for first in range(0, len(matrix), step):
            part = torch.arange(first, min(first + step, len(matrix)), device=matrix.device)
            self._add(group, matrix[first : first + step], *self.deposit(name, part, matrix.shape[1]))

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
        shape = (matrix_shape(self.shapes[name])[0], cols)
        seed, dim = self.projections.seed, self.rows.shape[1]
        pair = self.projections.keep((name, rows.device), lambda: sample_pair_hash(shape, dim, seed, name, self.rows))
        return pair.places(rows), pair.signs(rows)
