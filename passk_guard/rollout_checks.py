"""Whether rollouts can be looked at at all, asked before a pass through the model is made of them."""

from __future__ import annotations

from passk_guard.errors import VoidRefresh
from passk_guard.types import Rollouts


def check_rollouts(rollouts: Rollouts, *, vocabulary: int | None, context: int | None) -> None:
    """Refuse what a sampler should not return; on a GPU an id outside of the vocabulary would end the process.

    Args:
        rollouts: B samples, from whatever sampler.
        vocabulary: token ids of the model are below it; None for unknown.
        context: tokens the model has positions for; None for unknown.

    Raises:
        VoidRefresh: lists of different lengths, no token in any completion, a token id that the model does not have,
            or a prompt with its completion longer than the context.
    """
    counts = {
        "prompts": len(rollouts.prompt_ids),
        "completions": len(rollouts.completions),
        "lists of completion tokens": len(rollouts.completion_ids),
    }
    if set(counts.values()) != {len(rollouts)}:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise VoidRefresh(f"the sampler returned {found}; expected {len(rollouts)} of each")
    if len(rollouts) and not any(len(ids) for ids in rollouts.completion_ids):
        raise VoidRefresh(f"the sampler returned no token in any of {len(rollouts)} completions")
    for number, (prompt, completion) in enumerate(zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)):
        length = len(prompt) + len(completion)
        if context is not None and length > context:
            raise VoidRefresh(
                f"sample {number} has {len(prompt)} + {len(completion)} tokens; the model has positions for {context}"
            )
        if not length:
            continue
        lowest, highest = _extremes(prompt, completion)
        if lowest < 0 or (vocabulary is not None and highest >= vocabulary):
            odd = lowest if lowest < 0 else highest
            raise VoidRefresh(f"sample {number} has the token id {odd}; the model has ids from 0 to {vocabulary}")


def _extremes(*parts: object) -> tuple[int, int]:
    ids = [token for part in parts for token in part]  # type: ignore[attr-defined]
    return min(ids), max(ids)
