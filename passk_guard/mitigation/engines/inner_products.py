"""Inner products of vectors held as lists of tensors, in float64 without a float64 copy of either."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from passk_guard.mitigation.engines.protocol import Parts

_CPU_SLICE = 1 << 18  # entries converted to float64 at a time: 2 MiB a vector, which stay in the cache
_SLICE = 1 << 22  # elsewhere the number of kernels counts, and 32 MiB a vector are little


def local_inner_products(pairs: Sequence[tuple[Parts, Parts]], device: torch.device) -> Tensor:
    """Sum of <a_i, b_i> over the tensors a_i, b_i of each pair: this process's part of the inner product.

    A list that stands in several pairs is read, and converted to float64, once for all of them.

    Args:
        pairs: P pairs of lists of tensors; within a pair the lists are equally long and their tensors have the same
            shapes, in any floating dtype. The two may be the same list.
        device: of the result.

    Returns:
        [P] float64. Squares of float32 entries up to 1e38 are finite in it; NaN and inf come through. All NaN where
        this process could not compute them, as out of memory.

    Raises:
        ValueError: the two lists of a pair differ in length or in a shape.
    """
    totals = torch.zeros(len(pairs), dtype=torch.float64, device=device)
    try:
        for places in _alike(pairs):
            vectors = {id(vector): vector for place in places for vector in pairs[place]}
            order = list(vectors)
            columns = [(order.index(id(left)), order.index(id(right))) for left, right in (pairs[i] for i in places)]
            totals[places] = _dots(list(vectors.values()), columns, device)
    except (RuntimeError, MemoryError):
        # The other ranks wait in the reduction that comes next: NaN reaches all of them.
        totals.fill_(torch.nan)
    return totals


def _alike(pairs: Sequence[tuple[Parts, Parts]]) -> list[list[int]]:
    """Places of the pairs whose tensors have the same shapes."""
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for place, (left, right) in enumerate(pairs):
        shapes = tuple(tensor.shape for tensor in left)
        if shapes != (others := tuple(tensor.shape for tensor in right)):
            raise ValueError(f"Expected parts of equal shapes; found {_first_difference(shapes, others)}.")
        groups.setdefault(shapes, []).append(place)
    return list(groups.values())


def _first_difference(shapes: Sequence[torch.Size], others: Sequence[torch.Size]) -> str:
    if len(shapes) != len(others):
        return f"{len(shapes)} and {len(others)} of them"
    return next(f"{tuple(a)} and {tuple(b)}" for a, b in zip(shapes, others, strict=True) if a != b)


def _dots(vectors: Sequence[Parts], columns: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """[len(columns)] inner products of the vectors that each column names, all of the same shapes."""
    sums, room = [torch.zeros(len(columns), dtype=torch.float64, device=device)], _Room()
    for parts in zip(*vectors, strict=True):
        products = []
        for slices in _slices(parts):
            wide = room.widen(slices)
            products += [torch.dot(wide[left], wide[right]) for left, right in columns]
        sums.append(torch.stack(products).view(-1, len(columns)).sum(0).to(device))
    return torch.stack(sums).sum(0)


def _slices(parts: Sequence[Tensor]) -> zip[tuple[Tensor, ...]]:
    size = _CPU_SLICE if parts[0].device.type == "cpu" else _SLICE
    return zip(*(part.detach().reshape(-1).split(size) for part in parts), strict=True)


class _Room:
    """Memory for one float64 slice of each vector, taken once for all parts of a device."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def widen(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """The slices in float64; they hold until the next call."""
        length, device = slices[0].numel(), slices[0].device
        if not self._rows or self._rows[0].numel() < length or self._rows[0].device != device:
            self._rows = [torch.empty(length, dtype=torch.float64, device=device) for _ in slices]
        return [row[:length].copy_(piece) for row, piece in zip(self._rows, slices, strict=True)]
