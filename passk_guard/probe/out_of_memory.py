"""What the probe does when memory runs out: the same in smaller pieces, on all ranks, while there are any."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from passk_guard.sketch import TokenBatch, halves
from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.ranks import Ranks

T = TypeVar("T")
# What the messages of PyTorch, cuBLAS and cuDNN contain where they raise no OutOfMemoryError.
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def until_it_fits(ranks: Ranks, attempt: Callable[[], T], smaller: Callable[[], bool]) -> T:
    """Make an attempt on all ranks, and a smaller one after each that ran out of memory on any of them.

    Args:
        ranks: the processes of the run.
        attempt: raises FailedRefresh on all ranks or on none, as `Ranks.together` does.
        smaller: makes the next attempt smaller; False where it cannot be. The same answer on every rank.

    Returns:
        What the attempt that fitted returned.

    Raises:
        FailedRefresh: the attempt failed for another reason, or cannot be made smaller.
    """
    while True:
        try:
            return attempt()
        except FailedRefresh as error:
            # Without its traceback, in whose frames the tensors of the attempt live on.
            reason, short = str(error), out_of_memory(error)
        if not ranks.max(int(short)):
            raise FailedRefresh(reason)
        free_memory()
        if not smaller():
            raise FailedRefresh(reason)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether the error, or one that it was raised from, reports that memory ran out."""
    while error is not None:
        message = str(error).lower()
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in message for words in _WORDS):
            return True
        error = error.__cause__
    return False


def free_memory() -> None:
    """Free unreferenced memory, on the device too, for the rest of this process."""
    gc.collect()
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        module = None if device is None else torch.get_device_module(device)
        getattr(module, "empty_cache", lambda: None)()


def largest(ranks: Ranks, batches: Sequence[TokenBatch]) -> tuple[int, int]:
    """Most tokens, padding included, and most completions of one batch, over all ranks."""
    tokens = ranks.max(max((batch.input_ids.numel() for batch in batches), default=0))
    samples = ranks.max(max((batch.slots.numel() for batch in batches), default=0))
    return tokens, samples


def halved(batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """Split each batch into two, so that ranks keep equally many; the other half of a single sample is a filler."""
    return [half for batch in batches for half in halves(batch)]
