"""Batches of right-padded samples: collated from ragged token lists under a token budget, or checked as a caller's."""

from __future__ import annotations

import math
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


def check_batch(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    slots: Tensor,
    num_slots: int,
    temperature: float,
) -> None:
    """Raise GuardError unless the arguments of `ScoreSketcher.sketch` fit together."""
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise GuardError(
            f"Expected `input_ids` [B, T] with B, T >= 1; found {list(input_ids.shape)}. Packed and padding-free "
            "batches merge samples: pass one sample per row."
        )
    for name, mask in (("attention_mask", attention_mask), ("completion_mask", completion_mask)):
        if mask.shape != input_ids.shape:
            raise GuardError(
                f"Expected `{name}` of the shape of `input_ids` {list(input_ids.shape)}; found "
                f"{list(mask.shape)}. Pass the batch dimension first, and one entry per token."
            )
    if slots.shape != input_ids.shape[:1] or slots.is_floating_point() or slots.dtype == torch.bool:
        raise GuardError(
            f"Expected int64 `slots` [{input_ids.shape[0]}], one per row of `input_ids`; found {list(slots.shape)} of "
            f"{slots.dtype}. Pass the row number of each sample."
        )
    if bool(((slots < -1) | (slots >= num_slots)).any()):
        raise GuardError(
            f"Expected `slots` in -1..{num_slots - 1}; found {int(slots.min())}..{int(slots.max())}. Pass -1 for "
            "samples to ignore, or raise `num_slots`."
        )
    _check_masks(attention_mask.bool(), completion_mask.bool())
    if not (math.isfinite(temperature) and temperature > 0):
        raise GuardError(f"Expected `temperature` > 0; found {temperature}. Pass that of the sampling.")


def _check_masks(attended: Tensor, completion: Tensor) -> None:
    if not bool(attended[:, 0].all()) or bool((attended[:, 1:] & ~attended[:, :-1]).any()):
        raise GuardError(
            "Expected rows of `attention_mask` to be ones followed by zeros; found padding on the left or in "
            "between. Pass right-padded rows, one sample each (see `token_batches`); packed rows are refused."
        )
    if bool((completion & ~attended).any()):
        raise GuardError(
            "Expected `completion_mask` within `attention_mask`; found completion tokens on padding. Pass 0 there."
        )
    if bool(completion[:, 0].any()):
        raise GuardError(
            "Expected `completion_mask` 0 at position 0, which no token predicts; found 1. Pass at least one "
            "prompt token before the completion, a BOS token for instance."
        )


def check_log_probs(log_probs: Tensor | None, batch: int) -> None:
    """Raise GuardError unless `log_probs` is None or a [batch] tensor that can hold log-probabilities."""
    if log_probs is not None and (log_probs.shape != (batch,) or not log_probs.is_floating_point()):
        raise GuardError(
            f"Expected `log_probs` [{batch}] in floating point, to be filled; found {list(log_probs.shape)} of "
            f"{log_probs.dtype}. Pass `torch.empty({batch})`, or None."
        )


def check_prompts(prompt_index: Tensor, correct: Tensor, num_prompts: int) -> None:
    """Raise GuardError unless each sample has a prompt in -1..num_prompts-1 and a verdict of 1, 0 or -1."""
    if prompt_index.shape != correct.shape:
        raise GuardError(
            f"Expected one `correct` per `prompt_index`; found {list(correct.shape)} and "
            f"{list(prompt_index.shape)}. Pass [B] for both."
        )
    if bool(((prompt_index < -1) | (prompt_index >= num_prompts)).any()):
        raise GuardError(
            f"Expected `prompt_index` in -1..{num_prompts - 1}; found {int(prompt_index.min())}.."
            f"{int(prompt_index.max())}. Pass -1 for fillers, or raise `num_prompts`."
        )
    if bool(((correct < -1) | (correct > 1)).any()):
        raise GuardError(
            f"Expected `correct` in -1, 0, 1; found {correct.unique().tolist()[:5]}. Pass 1 for correct, 0 for "
            "wrong and -1 for no verdict."
        )


def check_dim(dim: int, method: str) -> None:
    """Raise GuardError unless `dim` is at least 16 and, for "kronecker", splits into two similar factors."""
    if dim < 16:
        raise GuardError(f"Expected `dim` >= 16; found {dim}. Pass 4096 or 16384.")
    small = max(d for d in range(1, math.isqrt(dim) + 1) if dim % d == 0)
    if method == "kronecker" and small < math.isqrt(dim) / 4:
        raise GuardError(
            f"Expected a `dim` with two similar factors for method 'kronecker'; found {dim} = {small} x "
            f"{dim // small}. Pass {2 ** round(math.log2(dim))}, or method 'countsketch'."
        )
