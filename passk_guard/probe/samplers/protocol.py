"""What a sampler takes and returns, and the refusal of prompts without room in a model's context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from passk_guard.utils.errors import GuardError


@dataclass(frozen=True)
class Samples:
    """n completions of each of m prompts, prompt-major: sample j of prompt i is entry i * n + j of each list.

    Attributes:
        prompt_ids: m * n lists of prompt tokens, no padding, the same list n times over.
        completion_ids: m * n lists of sampled tokens, no padding, up to and with the end-of-sequence token, and of the
            tokens in `policy_masks` that were not sampled.
        completions: m * n decoded completions as a TRL reward function gets them: a text, or for a
            conversational prompt a list of messages, such as one of the assistant.
        policy_masks: m * n lists with 1 for each token that the policy sampled and 0 for each that was put between, as
            of a tool; None where it sampled all.
        columns: what the reward function gets besides the columns of the row, one value a sample and as it is:
            the environments, what a rollout function returned.
        log_probs: m * n numbers, log mu of each completion under what it was sampled from, in nats, where that is
            computed apart from the model, as by vLLM. None: completions are samples of the model's own softmax.
        lost: the entries that are no sample and get no reward, with the reason: an environment that failed.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    completions: list[Any]
    policy_masks: list[list[int]] | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    log_probs: list[float] | None = None
    lost: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completion_ids)


@runtime_checkable
class Sampler(Protocol):
    """Samples completions from the policy.

    A sampler may also have `sample_fewer() -> bool`, which is called on every rank when memory ran out on one. It
    lowers the number of completions generated at once and returns True, or False if it is the lowest already. It may
    have `finish()`, which is called when the completions are scored, and ends what they needed.
    """

    @property
    def temperature(self) -> float:
        """Sampling temperature; log-probabilities of the samples are taken at the same one."""

    def sample(self, rows: Sequence[Mapping[str, Any]], num_samples: int, seed: int) -> Samples:
        """Sample n = `num_samples` completions of the prompt of each row, with `seed`.

        Model, tokenizer and torch's random generators are left as they were. With several ranks each passes the
        same number of rows, and a different seed.
        """

    def check_lengths(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raise GuardError when a prompt is empty or leaves no room for its completion."""


def refuse_misfits(lengths: Sequence[int], context: int | None, max_new_tokens: int, argument: str) -> None:
    """Refuse prompts that the context has no room for: cut short, they would be different prompts.

    Args:
        lengths: tokens of each prompt.
        context: positions in all; None checks for empty prompts only.
        max_new_tokens: longest completion.
        argument: the caller's name for `max_new_tokens`, for the message.

    Raises:
        GuardError: naming how many prompts do not fit and the longest of them.
    """
    if empty := sum(length == 0 for length in lengths):
        raise GuardError(f"{empty} of {len(lengths)} probe prompts have no tokens. Remove them from the probe.")
    if context is None:
        return
    room = context - max_new_tokens
    if long := sum(length > room for length in lengths):
        raise GuardError(
            f"{long} of {len(lengths)} probe prompts do not fit: expected at most {room} tokens (context {context} - "
            f"`{argument}` {max_new_tokens}); found up to {max(lengths)}. Drop them from the probe or lower "
            f"`{argument}`."
        )
