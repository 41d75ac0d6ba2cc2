"""Whether rollouts can be looked at at all, asked before a pass through the model is made of them."""

from __future__ import annotations

import operator
from typing import Any

from passk_guard.probe.records import Rollouts
from passk_guard.probe.samplers.protocol import context_length
from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.text import brief

_LARGEST = 2**31  # above the vocabulary of any model


def check_rollouts(rollouts: Rollouts, *, vocabulary: int | None, context: int | None) -> None:
    """Refuse what a sampler should not return; on a GPU an id outside of the vocabulary would end the process.

    Args:
        rollouts: B samples, from whatever sampler.
        vocabulary: token ids of the model are below it; None for unknown.
        context: tokens the model has positions for; None for unknown.

    Raises:
        FailedRefresh: lists of different lengths or none at all, no token in any completion, a token id that is no
            whole number or that the model does not have, no token in a prompt, or a prompt with its
            completion longer than the context.
    """
    counts = {
        "prompts": _length(rollouts.prompt_ids),
        "completions": _length(rollouts.completions),
        "lists of completion tokens": _length(rollouts.completion_ids),
    }
    if set(counts.values()) != {len(rollouts)}:
        found = ", ".join(f"{'no list of' if count is None else count} {name}" for name, count in counts.items())
        raise FailedRefresh(f"the sampler returned {found}; expected {len(rollouts)} of each")
    some, limit = False, _LARGEST if vocabulary is None else vocabulary
    for number, (prompt, completion) in enumerate(zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)):
        ids = [*_tokens(prompt, number), *_tokens(completion, number)]
        some = some or len(completion) > 0
        if len(prompt) == 0:  # the first token of a completion is predicted from the last one of the prompt
            raise FailedRefresh(f"sample {number} has no prompt token; start prompts with a BOS token")
        if context is not None and len(ids) > context:
            raise FailedRefresh(
                f"sample {number} has {len(prompt)} + {len(completion)} tokens; the model has positions for {context}"
            )
        lowest, highest = min(ids, default=0), max(ids, default=0)
        if ids and (lowest < 0 or highest >= limit):
            odd = lowest if lowest < 0 else highest
            raise FailedRefresh(
                f"sample {number} has the token id {brief(odd)}; the model has ids from 0 to {vocabulary}"
            )
    if len(rollouts) and not some:
        raise FailedRefresh(f"the sampler returned no token in any of {len(rollouts)} completions")


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except Exception:
        return None


def _tokens(ids: Any, number: int) -> list[int]:
    """The ids of one text as whole numbers; a tensor or an array of them is a list of them."""
    try:
        return [operator.index(token) for token in ids]
    except Exception:
        raise FailedRefresh(f"sample {number} has the tokens {brief(ids)}; expected a list of whole numbers") from None


def limits_of(model: Any) -> dict[str, int | None]:
    """What the model can read: token ids below `vocabulary`, `context` tokens at once; None where it does not say."""
    try:
        vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        vocabulary = None
    return {"vocabulary": vocabulary, "context": context_length(model) if hasattr(model, "config") else None}


def padding_token(processing_class: Any) -> int:
    """What batches of the sketch are filled up with; a processor's is its tokenizer's."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    candidates = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0)
    return next(token for token in candidates if token is not None)
