"""Prompts that do not fit are refused up front: cut short, they would be different prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from passk_guard.utils.errors import GuardError


def context_length(model: Any) -> int | None:
    """Positions the model can attend to (config.max_position_embeddings), None when its config does not say."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def refuse_misfits(lengths: Sequence[int], context: int | None, max_new_tokens: int, argument: str) -> None:
    """Check prompt lengths, in tokens, against the room the context leaves beside the completion.

    Args:
        lengths: tokens of each prompt.
        context: positions in all; None checks for empty prompts only.
        max_new_tokens: longest completion.
        argument: the name under which the caller knows `max_new_tokens`, for the message.

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
