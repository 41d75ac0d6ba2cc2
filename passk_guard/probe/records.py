"""The records of one refresh before there is a Gram matrix: sampled completions and their verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Rollouts:
    """Sampled completions of one rank, flat: entry i of every list describes sample i (B samples in all).

    Attributes:
        rows: dataset row of each sample, with `prompt` and the columns the reward needs.
        prompt_index: which prompt of the refresh, in 0..num_prompts-1, the same numbering on every rank;
            -1 marks a filler that keeps ranks in step and is counted nowhere.
        prompt_ids: prompt tokens, no padding.
        completion_ids: completion tokens, no padding, with the end-of-sequence token where one was sampled.
        completions: decoded completion, a text or a list of messages as the reward function expects.
        num_prompts: m, prompts of the refresh over all ranks.
        temperature: sampling temperature; log-probabilities are taken at the same one.
    """

    rows: Sequence[Mapping[str, Any]]
    prompt_index: Sequence[int]
    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    completions: Sequence[Any]
    num_prompts: int
    temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.prompt_index)


@dataclass(frozen=True)
class Outcomes:
    """Verdict of the verifier on each sample of a `Rollouts`.

    Attributes:
        correct: [B] int8: 1 correct, 0 wrong, -1 no verdict (the reward was None or NaN, its call raised, or
            the sample is a filler).
        failures: number of samples whose reward call raised.
        reason: first exception met, as text; None when there was none.
        best_reward: largest reward seen, None when no sample had one.
    """

    correct: Tensor
    failures: int = 0
    reason: str | None = None
    best_reward: float | None = None
