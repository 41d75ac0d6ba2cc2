"""Base class of a sketching method, which turns layer inputs and output gradients into rows of the sketch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

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

    def spans(self, width: int) -> list[Span]:
        """The groups among the B T tokens of a batch of that width."""
        return [(group, start * width, end * width) for group, (_, start, end) in enumerate(self.layout.groups)]

    def fold_into(self, sketch: Tensor) -> None:
        """Add the rows to their slots of sketch [num_slots, dim]."""
        for row, (slot, _, _) in enumerate(self.layout.groups):
            sketch[slot] += self.rows[row]
