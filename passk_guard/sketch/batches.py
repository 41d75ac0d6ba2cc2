"""Collate ragged token lists into right-padded batches under a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passk_guard.utils.errors import GuardError


@dataclass(frozen=True)
class TokenBatch:
    """Prompt followed directly by completion, padded on the right; positions count 0, 1, 2, ...

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64, 1 on tokens and 0 on padding.
        completion_mask: [B, T] int64, 1 on completion tokens.
        slots: [B] int64, the row of the sketch that each sample adds to; -1: none.
        factors: [B] float64 by which the samples' scores are multiplied; None: 1 for each.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    slots: Tensor
    factors: Tensor | None = None


def token_batches(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    slots: Sequence[int],
    *,
    max_tokens: int,
    pad_token_id: int,
    device: torch.device | str,
) -> Iterator[TokenBatch]:
    """Batches of similar length with B T <= max_tokens each; a longer sample gets a separate batch.

    Args:
        prompt_ids: prompt tokens of each sample, at least one.
        completion_ids: completion tokens of each sample.
        slots: row of the sketch for each sample; samples with slot -1 are dropped.
        max_tokens: padded tokens of a batch, > 0.
        pad_token_id: fills the padding.
        device: where the batches are put.

    Raises:
        GuardError: the lists differ in length, max_tokens < 1, or a kept sample has an empty prompt.
    """
    if not len(prompt_ids) == len(completion_ids) == len(slots):
        raise GuardError(
            "Expected as many `prompt_ids` as `completion_ids` and `slots`; found "
            f"{len(prompt_ids)}, {len(completion_ids)} and {len(slots)}. Pass one entry per sample."
        )
    if max_tokens < 1:
        raise GuardError(f"Expected `max_tokens` >= 1; found {max_tokens}. Pass the tokens that fit in memory.")
    samples = [
        (list(prompt), list(completion), int(slot))
        for prompt, completion, slot in zip(prompt_ids, completion_ids, slots, strict=True)
        if slot != -1
    ]
    if empty := [slot for prompt, _, slot in samples if not prompt]:
        raise GuardError(
            f"Expected at least one prompt token per sample; found an empty prompt in slot {empty[0]}. The first "
            "completion token is predicted from the last prompt token: start the prompt with a BOS token."
        )
    return _collated(samples, max_tokens, pad_token_id, torch.device(device))


_Sample = tuple[list[int], list[int], int]


def _length(sample: _Sample) -> int:
    return len(sample[0]) + len(sample[1])


def _collated(samples: list[_Sample], max_tokens: int, pad_token_id: int, device: torch.device) -> Iterator[TokenBatch]:
    # Longest first: the first batch needs the most memory, so that out of memory happens at once if at all.
    batch: list[_Sample] = []
    for sample in sorted(samples, key=_length, reverse=True):
        if batch and _length(batch[0]) * (len(batch) + 1) > max_tokens:
            yield _collate(batch, pad_token_id, device)
            batch = []
        batch.append(sample)
    if batch:
        yield _collate(batch, pad_token_id, device)


def _collate(samples: list[_Sample], pad_token_id: int, device: torch.device) -> TokenBatch:
    width = max(_length(sample) for sample in samples)
    input_ids = torch.full((len(samples), width), pad_token_id, dtype=torch.int64)
    attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, (prompt, completion, _) in enumerate(samples):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion, dtype=torch.int64)
        attention_mask[row, :end] = 1
        completion_mask[row, len(prompt) : end] = 1
    slots = torch.tensor([slot for _, _, slot in samples], dtype=torch.int64)
    return TokenBatch(*(x.to(device) for x in (input_ids, attention_mask, completion_mask, slots)))


def filler_batch(*, pad_token_id: int, device: torch.device | str) -> TokenBatch:
    """One sample of two tokens with slot -1, for a rank without samples.

    Sharded models gather their weights in every forward and backward, so that all ranks must run equally many.
    """
    return _collate([([pad_token_id], [pad_token_id], -1)], pad_token_id, torch.device(device))
