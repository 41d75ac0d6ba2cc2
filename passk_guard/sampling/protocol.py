"""What a sampler takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Samples:
    """n completions of each of m prompts, prompt-major: sample j of prompt i is entry i * n + j of each list.

    Attributes:
        prompt_ids: m * n lists of prompt tokens, no padding, the same list n times over.
        completion_ids: m * n lists of sampled tokens, no padding, up to and with the first end-of-sequence token.
        completions: m * n decoded completions as a TRL reward function gets them: a text, or for a
            conversational prompt a list with one assistant message.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    completions: list[Any]

    def __len__(self) -> int:
        return len(self.completion_ids)


@runtime_checkable
class Sampler(Protocol):
    """Draws completions from the policy.

    A sampler may also have `sample_fewer() -> bool`: called on every rank when memory ran out on one, it lowers the
    number of completions generated at once and returns True, or False when there is no less.
    """

    @property
    def temperature(self) -> float:
        """Sampling temperature; log-probabilities of the samples are taken at the same one."""
        ...

    def sample(self, rows: Sequence[Mapping[str, Any]], num_samples: int, seed: int) -> Samples:
        """n = `num_samples` completions of the prompt of each row, drawn with `seed`.

        Model, tokenizer and torch's random generators are left as they were. With several ranks each passes the
        same number of rows, and its own seed.
        """
        ...

    def check_lengths(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raise GuardError when a prompt is empty or leaves no room for its completion."""
        ...
