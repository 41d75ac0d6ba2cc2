"""Held-out prompts, divided among the ranks and sampled: the rollouts of a refresh."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from passk_guard.probe.prompts import ProbeSet
from passk_guard.probe.records import Rollouts
from passk_guard.probe.samplers import Sampler


@dataclass(frozen=True)
class HeldOut:
    """Samples the prompts of a probe set.

    Attributes:
        probe: the prompts.
        sampler: samples the completions.
        size: m, prompts of a refresh over all ranks.
        num_samples: n, completions of each.
        seed: of the choice of prompts and of the sampling.
    """

    probe: ProbeSet
    sampler: Sampler
    size: int
    num_samples: int
    seed: int

    @property
    def summary(self) -> str:
        """For a log line: how much is sampled of how many prompts."""
        size = min(self.size, len(self.probe))
        return f"{size} of {len(self.probe)} held-out prompts x {self.num_samples} samples"

    def keys(self, refresh: int) -> list[Hashable]:
        """Identities of the m prompts of a refresh, in order."""
        return [self.probe.key(i) for i in self.probe.draw(refresh, self.size, self.seed)]

    def rollouts(self, refresh: int, rank: int, num_ranks: int) -> Rollouts:
        """Sample this rank's share of a refresh: every `num_ranks`-th prompt, n completions each.

        Ranks sample equally many prompts, since parts of one model must run the same number of steps. Where the
        prompts do not divide, some are sampled once more as fillers, which are counted nowhere.
        """
        chosen = self.probe.draw(refresh, self.size, self.seed)
        places = range(rank, rank + num_ranks * -(-len(chosen) // num_ranks), num_ranks)
        rows = [self.probe[chosen[place % len(chosen)]] for place in places]
        samples = self.sampler.sample(rows, self.num_samples, _mix(self.seed, refresh, rank))
        return Rollouts(
            rows=_repeat(rows, self.num_samples),
            prompt_index=_repeat([place if place < len(chosen) else -1 for place in places], self.num_samples),
            prompt_ids=samples.prompt_ids,
            completion_ids=samples.completion_ids,
            completions=samples.completions,
            num_prompts=len(chosen),
            temperature=self.sampler.temperature,
        )


def _repeat(items: Sequence[Any], times: int) -> list[Any]:
    return [item for item in items for _ in range(times)]


def _mix(seed: int, refresh: int, rank: int) -> int:
    """One seed below 2**63 from three numbers, different for any two triples that a run can meet."""
    return (seed * 1_000_003 + refresh) * 65_536 + rank & (2**63 - 1)
