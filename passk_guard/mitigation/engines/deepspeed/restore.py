"""Putting back what a backward pass outside training changes in a DeepSpeed engine and its optimizer."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

_CONTAINERS = (dict, list, set, deque)
_SCALARS = (bool, int, float, str, type(None))


@contextmanager
def engine_untouched(engine: Any) -> Iterator[None]:
    """Counters, accumulation flags, hook state, buckets and timers of `engine` and its optimizer are put back on exit.

    Attributes get back the object they named, and dicts, lists and sets among them their contents (not their
    contents' contents). Tensors are not copied: what is written into them in place stays written.
    """
    optimizer = engine.optimizer
    timers = getattr(getattr(engine, "timers", None), "timers", {})
    buckets = getattr(optimizer, "ipg_buckets", {}).values()
    hooks = getattr(optimizer, "_backward_hook_state", None)
    with ExitStack() as stack:
        stack.callback(_restore(engine, scalars_only=True))
        for obj in (optimizer, hooks, *buckets, getattr(engine, "tput_timer", None), *timers.values()):
            if obj is not None:
                stack.callback(_restore(obj))
        stack.callback(_contents(timers))
        yield


def _restore(obj: Any, scalars_only: bool = False) -> Callable[[], None]:
    attributes = dict(vars(obj))
    if scalars_only:
        attributes = {name: value for name, value in attributes.items() if isinstance(value, _SCALARS)}
    refills = [_contents(value) for value in attributes.values() if isinstance(value, _CONTAINERS)]

    def restore() -> None:
        for refill in refills:
            refill()
        for name, value in attributes.items():
            if vars(obj).get(name) is not value:
                setattr(obj, name, value)

    return restore


def _contents(container: Any) -> Callable[[], None]:
    """Refills the container itself: DeepSpeed's parameters hold references to some of these dicts."""
    kept = copy.copy(container)

    def refill() -> None:
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(kept)

    return refill


# Buffers of an engine that a probe borrows: their contents come back, and the result needs no copy of its own.


_BLOCK = 1 << 22
"""Elements held aside at a time."""


@torch.no_grad()
def swap_(left: Tensor, right: Tensor) -> None:
    """Exchange the contents of two tensors of one shape and dtype, block by block."""
    for x, y in zip(left.view(-1).split(_BLOCK), right.view(-1).split(_BLOCK), strict=True):
        held = x.clone()
        x.copy_(y)
        y.copy_(held)


class Lent:
    """Persistent buffers of an engine that a probe writes into, and that get their contents back.

    One copy is made, of what the buffers held; `take` exchanges the two, so that the copy becomes the result.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = list(buffers)
        self._copies = [buffer.detach().clone() for buffer in self._buffers]
        self._taken = False

    def take(self) -> list[Tensor]:
        """What the buffers hold now, in storage of its own; the buffers hold again what they did at first."""
        for buffer, kept in zip(self._buffers, self._copies, strict=True):
            swap_(buffer, kept)
        self._taken = True
        return self._copies

    @torch.no_grad()
    def restore(self) -> None:
        """Give the buffers their contents back, unless `take` has."""
        if not self._taken:
            for buffer, copy in zip(self._buffers, self._copies, strict=True):
                buffer.copy_(copy)
