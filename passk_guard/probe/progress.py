"""A progress bar over the completions of one refresh."""

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


# Progress bars over the two slow stages.


Advance = Callable[[int, int], None]


def wanted(setting: bool | None, ranks: Ranks) -> bool:
    """Whether to show bars: on the first rank, and without a setting in a terminal only."""
    return ranks.index == 0 and (sys.stderr.isatty() if setting is None else setting)


@contextmanager
def bar(stage: str, shown: bool) -> Iterator[Advance]:
    """A bar over completions, followed by calling what this gives with (done, in all)."""
    with tqdm(desc=f"passk_guard {stage}", unit="completion", disable=not shown) as line:

        def advance(done: int, total: int) -> None:
            line.total = total
            line.update(done - line.n) if shown else None

        yield advance


class SketchWithBar(ScoreSketcher):
    """A `ScoreSketcher` that says how far it is.

    Args:
        model, dim, method, seed: as for `ScoreSketcher`.
        advance: called with (completions sketched, completions in all) after each batch.
    """

    def __init__(self, model: nn.Module, dim: int, method: Method, seed: int, advance: Advance) -> None:
        super().__init__(model, dim=dim, method=method, seed=seed)
        self._advance, self._done, self._total = advance, 0, 0

    def expect(self, rollouts: Rollouts, outcomes: Outcomes) -> None:
        """Count what there is to sketch: the completions of this rank's prompts that were solved sometimes."""
        right: dict[int, set[int]] = {}
        for prompt, verdict in zip(rollouts.prompt_index, outcomes.correct.tolist(), strict=True):
            right.setdefault(prompt, set()).add(verdict)
        solved_sometimes = {prompt for prompt, verdicts in right.items() if {0, 1} <= verdicts}
        self._total = sum(prompt in solved_sometimes for prompt in rollouts.prompt_index)
        self._advance(0, self._total)

    def sketch(self, input_ids: Tensor, *rest: Any, **options: Any) -> Tensor:
        """As `ScoreSketcher.sketch`."""
        sketched = super().sketch(input_ids, *rest, **options)
        self._done = min(self._done + input_ids.shape[0], self._total)
        self._advance(self._done, self._total)
        return sketched
