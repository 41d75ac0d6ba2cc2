"""The order in which ZeRO-3 expects modules to need their weights, which a probe's passes must have no part in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from passk_guard.private_api import check, seams


@contextmanager
def untraced(wrapped: Any) -> Iterator[None]:
    """Let ZeRO-3 forget the order of modules that it recorded in the body, or before it; nothing on other engines.

    It gathers weights ahead by the order of the last pass it recorded. If that is a probe's, which calls the head, then
    in the training pass of a TRL trainer, which reads the head's weight without a call, the weight is there ahead of
    time, is not noted as one that the backward needs as well, and is empty when its gradient arrives. TRL forgets the
    order after generation for the same reason. The next pass of training records it again.

    Args:
        wrapped: the model as training calls it; a DeepSpeedEngine of stage 3, or anything else.

    Raises:
        GuardError: before the body, where this DeepSpeed has no such order to forget.
    """
    sharder, coordinator = getattr(getattr(wrapped, "optimizer", None), "parameter_offload", None), None
    if sharder is not None:
        check(seams.ZERO3_TRACER, sharder)
        coordinator = sharder.get_param_coordinator()
        check(seams.ZERO3_TRACE, coordinator)
    try:
        yield
    finally:
        if coordinator is not None and not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
