"""The records of one refresh before there is a Gram matrix, and whether a model can read them."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from passk_guard.utils.errors import FailedRefresh


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
        policy_masks: for each completion token 1 where the policy sampled it, 0 where something else put it there: a
            tool's result, an environment's answer, an injected turn. The probability of a completion is the product
            over the tokens with 1. None: the policy sampled all.
        columns: arguments of the reward function beside the columns of the rows, one value a sample, passed as it is.
        log_probs: log mu of each completion, as of `Samples`; None where the model itself was sampled.
        lost: number and reason of those that are no sample, which get no verdict.
    """

    rows: Sequence[Mapping[str, Any]]
    prompt_index: Sequence[int]
    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    completions: Sequence[Any]
    num_prompts: int
    temperature: float = 1.0
    policy_masks: Sequence[Sequence[int]] | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    log_probs: Sequence[float] | None = None
    lost: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_index)


@dataclass(frozen=True)
class Outcomes:
    """Verdict of the verifier on each sample of a `Rollouts`.

    Attributes:
        correct: [B] int8: 1 correct, 0 wrong, -1 no verdict (the reward was None or NaN, its call raised, or
            the sample is a filler or lost).
        failures: number of samples that were lost or whose reward call raised.
        reason: first exception met, as text; None when there was none.
        best_reward: largest reward seen, None when no sample had one.
        rewards: [B] float32 that the verdicts are from, NaN for none; None where only verdicts are known.
        scores: [B] the same of the reward function whose mean is held (`hold_metric`); None where none is.
    """

    correct: Tensor
    failures: int = 0
    reason: str | None = None
    best_reward: float | None = None
    rewards: Tensor | None = None
    scores: Tensor | None = None

    def with_scores(self, of: Outcomes) -> Outcomes:
        """The same with the rewards of another function, or of this one, as scores."""
        if of is self:
            return replace(self, scores=self.rewards)
        failures, reason = self.failures + of.failures, self.reason or of.reason
        return replace(self, scores=of.rewards, failures=failures, reason=reason)


def check_rollouts(rollouts: Rollouts, *, vocabulary: int | None, context: int | None) -> None:
    """Refuse what a sampler should not return; on a GPU an id outside of the vocabulary would end the process.

    Args:
        rollouts: B samples, from any sampler.
        vocabulary: token ids of the model are below it; None for unknown.
        context: tokens the model has positions for; None for unknown.

    Raises:
        FailedRefresh: lists of different lengths, a log-probability that is not finite, no token of the policy in any
            completion, a token id that is no whole number or that the model does not have, no token in a prompt, a
            prompt with its completion longer than the context, or a mask that is not one 0 or 1 for each token of the
            completion.
    """
    prompts, completions, texts = rollouts.prompt_ids, rollouts.completion_ids, rollouts.completions
    if {len(prompts), len(texts), len(completions)} != {len(rollouts)}:
        raise FailedRefresh(
            f"the sampler returned {len(prompts)} prompts, {len(texts)} completions and {len(completions)} lists of "
            f"completion tokens; expected {len(rollouts)} of each"
        )
    if rollouts.log_probs is not None and not (
        len(rollouts.log_probs) == len(rollouts) and all(map(math.isfinite, rollouts.log_probs))
    ):
        raise FailedRefresh(
            f"the sampler returned {len(rollouts.log_probs)} log-probabilities; expected {len(rollouts)} finite ones"
        )
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if len(prompt) == 0:  # the first token of a completion is predicted from the last one of the prompt
            raise FailedRefresh(f"sample {number} has no prompt token; start prompts with a BOS token")
        if context is not None and len(prompt) + len(completion) > context:
            raise FailedRefresh(
                f"sample {number} has {len(prompt)} + {len(completion)} tokens; the model has positions for {context}"
            )
        try:
            ids = [operator.index(token) for part in (prompt, completion) for token in part]
        except TypeError as error:
            raise FailedRefresh(f"sample {number} has tokens that are not whole numbers: {error}") from None
        limit = math.inf if vocabulary is None else vocabulary
        if odd := [token for token in (min(ids), max(ids)) if not 0 <= token < limit]:
            raise FailedRefresh(f"sample {number} has the token id {odd[0]}; the model has ids from 0 to {vocabulary}")
    if (masks := rollouts.policy_masks) is not None:
        _check_masks(masks, completions)
        if len(rollouts) and not any(map(any, masks)):
            raise FailedRefresh(f"the policy sampled no token in any of {len(rollouts)} completions")
    if len(rollouts) and not any(map(len, completions)):
        raise FailedRefresh(f"the sampler returned no token in any of {len(rollouts)} completions")


def _check_masks(masks: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> None:
    if len(masks) != len(completions):
        raise FailedRefresh(f"the sampler returned {len(masks)} masks for {len(completions)} completions")
    for number, (mask, completion) in enumerate(zip(masks, completions, strict=True)):
        if len(mask) != len(completion) or not set(mask) <= {0, 1}:
            raise FailedRefresh(
                f"sample {number} has {len(completion)} tokens and a mask of {len(mask)}, of {sorted(set(mask))}; "
                "expected 1 for each token that the policy sampled and 0 for each other"
            )


def limits_of(model: Any) -> dict[str, int | None]:
    """What the model can read: token ids below `vocabulary`, `context` tokens at once; None where it is unknown."""
    try:
        vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        vocabulary = None
    return {"vocabulary": vocabulary, "context": context_length(model) if hasattr(model, "config") else None}


def context_length(model: Any) -> int | None:
    """Positions the model can attend to (config.max_position_embeddings), None when its config does not give it."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def padding_token(processing_class: Any) -> int:
    """The token that fills batches of the sketch; a processor's is its tokenizer's."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    candidates = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
    return next(token for token in candidates if token is not None)
