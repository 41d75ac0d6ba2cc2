"""Putting back what a forward and backward pass outside training changes in a DeepSpeed engine and its optimizer."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from passk_guard.utils.private_api import requires

_CONTAINERS = (dict, list, set, deque)
_SCALARS = (bool, int, float, str, type(None))
_BLOCK = 1 << 22  # elements that are exchanged at a time
_requires = partial(requires, "deepspeed", applies="any trainer under ZeRO-3", instead="use ZeRO-2")
TRACER_NEEDS = _requires("DeepSpeedZeRoOffload", get_param_coordinator="the order it gathers weights in")
TRACE_NEEDS = _requires(
    "PartitionedParameterCoordinator",
    is_invalid_trace="whether there is an order",
    _invalidate_trace="the order of a probe is forgotten",
)


@contextmanager
def untraced(wrapped: Any) -> Iterator[None]:
    """Let ZeRO-3 forget the order of modules that it recorded in the body, or before it; nothing on other engines.

    ZeRO-3 gathers weights ahead by the order of the last pass it recorded. A probe's pass calls the head; the training
    pass of a TRL trainer reads the head's weight without a call. By the probe's order that weight is there ahead of
    time, is not noted as one that the backward needs as well, and is empty when its gradient arrives. TRL forgets the
    order after generation for the same reason. The next pass of training records it again.

    Args:
        wrapped: the model as training calls it; a DeepSpeedEngine of stage 3, or anything else.

    Raises:
        GuardError: before the body, where this DeepSpeed has no such order to forget.
    """
    sharder, coordinator = getattr(getattr(wrapped, "optimizer", None), "parameter_offload", None), None
    if sharder is not None:
        TRACER_NEEDS.check(sharder)
        coordinator = sharder.get_param_coordinator()
        TRACE_NEEDS.check(coordinator)
    try:
        yield
    finally:
        if coordinator is not None and not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()


@contextmanager
def engine_untouched(engine: Any) -> Iterator[None]:
    """Put back on exit the counters, accumulation flags, hook state, buckets and timers of `engine` and its optimizer.

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


class Lent:
    """Persistent buffers of an engine that a probe writes into, and that get their contents back.

    One copy is made, of what the buffers held; `take` exchanges the two block by block, so that the copy becomes the
    result.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = list(buffers)
        self._copies = [buffer.detach().clone() for buffer in self._buffers]
        self._taken = False

    @torch.no_grad()
    def take(self) -> list[Tensor]:
        """What the buffers hold now, in separate storage; the buffers hold again what they did at first."""
        for buffer, kept in zip(self._buffers, self._copies, strict=True):
            for x, y in zip(buffer.view(-1).split(_BLOCK), kept.view(-1).split(_BLOCK), strict=True):
                held = x.clone()
                x.copy_(y)
                y.copy_(held)
        self._taken = True
        return self._copies

    @torch.no_grad()
    def restore(self) -> None:
        """Give the buffers their contents back, unless `take` has."""
        if not self._taken:
            for buffer, copy in zip(self._buffers, self._copies, strict=True):
                buffer.copy_(copy)
