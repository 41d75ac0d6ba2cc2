"""Whether a model can read the rollouts of a sampler, checked before a pass through the model."""

from __future__ import annotations

import math
import operator
from typing import Any

from passk_guard.probe.records import Rollouts
from passk_guard.probe.samplers.protocol import context_length
from passk_guard.utils.errors import FailedRefresh


def check_rollouts(rollouts: Rollouts, *, vocabulary: int | None, context: int | None) -> None:
    """Refuse what a sampler should not return; on a GPU an id outside of the vocabulary would end the process.

    Args:
        rollouts: B samples, from any sampler.
        vocabulary: token ids of the model are below it; None for unknown.
        context: tokens the model has positions for; None for unknown.

    Raises:
        FailedRefresh: lists of different lengths, no token in any completion, a token id that is no whole number or
            that the model does not have, no token in a prompt, or a prompt with its completion longer than the context.
    """
    prompts, completions, texts = rollouts.prompt_ids, rollouts.completion_ids, rollouts.completions
    if {len(prompts), len(texts), len(completions)} != {len(rollouts)}:
        raise FailedRefresh(
            f"the sampler returned {len(prompts)} prompts, {len(texts)} completions and {len(completions)} lists of "
            f"completion tokens; expected {len(rollouts)} of each"
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
    if len(rollouts) and not any(map(len, completions)):
        raise FailedRefresh(f"the sampler returned no token in any of {len(rollouts)} completions")


def limits_of(model: Any) -> dict[str, int | None]:
    """What the model can read: token ids below `vocabulary`, `context` tokens at once; None where it is unknown."""
    try:
        vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        vocabulary = None
    return {"vocabulary": vocabulary, "context": context_length(model) if hasattr(model, "config") else None}


def padding_token(processing_class: Any) -> int:
    """The token that fills batches of the sketch; a processor's is its tokenizer's."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    candidates = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
    return next(token for token in candidates if token is not None)
