"""A progress bar over the completions of one refresh."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


def wants_bar(setting: bool | None, trainer: Any) -> bool:
    """Whether to show one: on the first rank, and without a setting only in a terminal and where tqdm is on."""
    if not trainer.state.is_world_process_zero:
        return False
    return setting if setting is not None else sys.stderr.isatty() and not trainer.args.disable_tqdm


@contextmanager
def sampling_bar(sampler: Any, shown: bool) -> Iterator[None]:
    """Follow the sampler's `on_progress`, where it has one; the bar is gone when the samples are there."""
    if not shown or not hasattr(sampler, "on_progress"):
        yield
        return
    before = sampler.on_progress
    with tqdm(desc="passk_guard probe", unit="completion", leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        sampler.on_progress = advance
        try:
            yield
        finally:
            sampler.on_progress = before
