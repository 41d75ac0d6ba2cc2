"""Which rank samples which prompts, and what is left to sample after an interruption.

Prompts go through the sampler in chunks, each with a seed. Which prompts form a chunk depends on the settings alone. A
chunk's completions are the same whichever rank samples them and whatever was sampled before, so several processes or a
run that was killed and started again give the same as one uninterrupted process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from passk_guard.analysis.store import PromptRollouts, RolloutStore
from passk_guard.probe.prompts import Row
from passk_guard.probe.records import Rollouts
from passk_guard.probe.samplers import Sampler
from passk_guard.utils.errors import GuardError
from passk_guard.utils.ranks import Ranks

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class SharedSampling:
    """Completions of m prompts, shared out over the ranks.

    Attributes:
        rows: of the m prompts.
        sampler: of the completions.
        num_samples: n of each prompt.
        batch_size: completions in a chunk, about.
        seed: of the chunks' seeds.
        ranks: the processes; each holds a whole model.
        store: keeps completions over interruptions.
    """

    rows: Sequence[Row]
    sampler: Sampler
    num_samples: int
    batch_size: int
    seed: int
    ranks: Ranks
    store: RolloutStore

    def run(self, on_progress: OnProgress = lambda done, total: None) -> Rollouts:
        """This rank's share, from the store where it is there and sampled where it is not.

        Args:
            on_progress: called with (completions there, completions in all) of this rank.

        Raises:
            GuardError: kept completions that are damaged.
        """
        own = [chunk for i, chunk in enumerate(self._chunks()) if i % self.ranks.count == self.ranks.index]
        kept = self._kept()
        total = sum(len(chunk) for chunk in own) * self.num_samples
        done = 0
        on_progress(done, total)
        for chunk in own:
            if not all(place in kept for place in chunk):
                fresh = self._sample(chunk, _shifted(on_progress, done, total))
                self.store.append(fresh)
                kept |= {one.place: one for one in fresh}
            done += len(chunk) * self.num_samples
            on_progress(done, total)
        return self._flat([kept[place] for chunk in own for place in chunk])

    def _chunks(self) -> list[range]:
        size = max(1, self.batch_size // self.num_samples)
        return [range(start, min(start + size, len(self.rows))) for start in range(0, len(self.rows), size)]

    def _kept(self) -> dict[int, PromptRollouts]:
        kept = self.store.read()
        for place, one in kept.items():
            if not 0 <= place < len(self.rows) or len(one.completions) != self.num_samples:
                raise GuardError(
                    f"Expected {self.num_samples} completions for each of {len(self.rows)} prompts; found "
                    f"{len(one.completions)} for prompt {place} in {str(self.store.folder)!r}. Remove that folder."
                )
        return kept

    def _sample(self, chunk: range, on_progress: OnProgress) -> list[PromptRollouts]:
        seed = (self.seed * 1_000_003 + chunk.start) & (2**63 - 1)
        if hasattr(self.sampler, "on_progress"):
            self.sampler.on_progress = on_progress
        n = self.num_samples
        samples = self.sampler.sample([self.rows[place] for place in chunk], n, seed)
        return [
            PromptRollouts(
                place,
                samples.prompt_ids[i * n],
                samples.completion_ids[i * n : (i + 1) * n],
                samples.completions[i * n : (i + 1) * n],
                None if samples.policy_masks is None else samples.policy_masks[i * n : (i + 1) * n],
            )
            for i, place in enumerate(chunk)
        ]

    def _flat(self, kept: Sequence[PromptRollouts]) -> Rollouts:
        n = self.num_samples
        masks = [
            mask
            for one in kept
            for mask in one.policy_masks or [[1] * len(ids) for ids in one.completion_ids]  # it sampled all
        ]
        return Rollouts(
            rows=[self.rows[one.place] for one in kept for _ in range(n)],
            prompt_index=[one.place for one in kept for _ in range(n)],
            prompt_ids=[one.prompt_ids for one in kept for _ in range(n)],
            completion_ids=[ids for one in kept for ids in one.completion_ids],
            completions=[text for one in kept for text in one.completions],
            num_prompts=len(self.rows),
            temperature=self.sampler.temperature,
            policy_masks=masks if any(one.policy_masks is not None for one in kept) else None,
        )


def _shifted(on_progress: OnProgress, done: int, total: int) -> OnProgress:
    """Add what is done before the chunk, since the sampler counts within it."""
    return lambda ready, _: on_progress(done + ready, total)
