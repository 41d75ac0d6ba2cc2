"""Progress bars over completions: of one refresh in training, and of the two stages of an analysis."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.sketch import Method, ScoreSketcher
from passk_guard.utils.ranks import Ranks

Advance = Callable[[int, int], None]


def wanted(setting: bool | None, ranks: Ranks, *, quiet: bool = False) -> bool:
    """Whether to show bars: on the first rank, and without a setting in a terminal only and not where `quiet`."""
    return ranks.index == 0 and (sys.stderr.isatty() and not quiet if setting is None else setting)


@contextmanager
def bar(stage: str, shown: bool, *, leave: bool = True) -> Iterator[Advance]:
    """A bar over completions, which is moved by calling what this yields with (done, in all)."""
    with tqdm(desc=f"passk_guard {stage}", unit="completion", disable=not shown, leave=leave) as line:

        def advance(done: int, total: int) -> None:
            line.total = total
            line.update(done - line.n) if shown else None

        yield advance


@contextmanager
def sampling_bar(sampler: Any, shown: bool) -> Iterator[None]:
    """A bar that follows the sampler's `on_progress`, where it has one, and is gone when the samples are there."""
    if not shown or not hasattr(sampler, "on_progress"):
        yield
        return
    before = sampler.on_progress
    with bar("probe", shown, leave=False) as sampler.on_progress:
        try:
            yield
        finally:
            sampler.on_progress = before


class SketchWithBar(ScoreSketcher):
    """A `ScoreSketcher` that reports its progress.

    Args:
        model, dim, method, seed: as for `ScoreSketcher`.
        advance: called with (completions sketched, completions in all) after each batch.
    """

    def __init__(self, model: nn.Module, dim: int, method: Method, seed: int, advance: Advance) -> None:
        super().__init__(model, dim=dim, method=method, seed=seed)
        self._advance, self._done, self._total = advance, 0, 0

    def expect(self, rollouts: Rollouts, outcomes: Outcomes) -> None:
        """Count the completions to sketch: those of this rank's prompts that were solved sometimes."""
        pairs = set(zip(rollouts.prompt_index, outcomes.correct.tolist(), strict=True))
        self._total = sum((x, 0) in pairs and (x, 1) in pairs for x in rollouts.prompt_index)
        self._advance(0, self._total)

    def sketch(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, *rest: Any, **options: Any
    ) -> Tensor:
        """As `ScoreSketcher.sketch`."""
        sketched = super().sketch(input_ids, attention_mask, completion_mask, *rest, **options)
        self._done = min(self._done + int(completion_mask.abs().amax(1).clamp(min=1).sum()), self._total)
        self._advance(self._done, self._total)
        return sketched
