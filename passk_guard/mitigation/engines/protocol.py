"""`GradientEngine`: the training gradient before the optimizer step in any engine; inner products of its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

_CPU_SLICE = 1 << 18  # entries converted to float64 at a time: 2 MiB a vector, which stay in the cache
_SLICE = 1 << 22  # elsewhere the number of kernels counts, and 32 MiB a vector are little
Batch = TypeVar("Batch")
Parts = Sequence[Tensor]
"""This rank's share of a vector in parameter space: tensors in a fixed order, the same on every call. Parts of two
vectors have the same shapes; a sharded engine holds different parts on each rank, a replicated one the same."""


class GradientEngine(Protocol):
    """One engine of one trainer.

    `install` sets a hook that runs when the gradient of a step is complete: summed over micro-batches, averaged over
    ranks, not yet clipped, not yet seen by the optimizer. In the hook, `gradient` is this rank's share, editable in
    place. `remove` leaves no trace. Everything is collective: all ranks call the same methods in the same order.
    """

    name: str

    def install(self, before_step: Callable[[], None]) -> None:
        """Call `before_step` once before each optimizer step, on every rank. Raises GuardError when installed."""

    def remove(self) -> None:
        """Take the hook out; does nothing when there is none."""

    def gradient(self) -> list[Tensor]:
        """This rank's share of the accumulated gradient times `loss_scale`: aliases, to be written to through `add_`.

        Only inside `before_step`. A parameter that no loss reached counts as zero.
        """

    def loss_scale(self) -> float:
        """What `gradient` is multiplied by (fp16); 1.0 otherwise."""

    def inner_products(self, pairs: Sequence[tuple[Parts, Parts]]) -> list[float]:
        """Global inner products of pairs of vectors, accumulated in float64, all in one all_reduce of scalars.

        The same numbers on every rank, to the last bit: ranks decide by them.
        """

    def add_(self, direction: Parts, coefficient: float) -> None:
        """gradient += coefficient * direction in place, with whatever the engine derived from the gradient.

        The gradient is that of `gradient`, loss scale included. Coefficient 0 changes no bit.
        """

    def probe_gradient(
        self, batches: Sequence[Batch], loss: Callable[[nn.Module, Batch], Tensor], dtype: Any = None
    ) -> list[Tensor]:
        """This rank's share of the gradient of sum over batches of loss(model, batch), averaged over ranks.

        Runs at a step boundary only, and leaves no trace in the engine: `.grad`, buffers, counters and accumulation
        flags are as before. Every rank passes equally many batches. Not multiplied by any loss scale.

        Args:
            batches: at least one.
            loss: scalar loss of one batch, given the module to forward through.
            dtype: of the result, fp32 by default, or bf16 to halve its memory.

        Raises:
            Whatever `loss` raises, after the same cleaning up.
            FailedRefresh: where `loss` went well but not on another rank. An engine that communicates in the forward
                pass (sharded weights) cannot know: there `loss` must raise on all ranks or on none.
        """


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
