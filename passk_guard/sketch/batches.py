"""Batches of right-padded rows: collated from ragged token lists under a token budget, or checked as a caller's.

A row is a prompt and its completion, or several completions side by side behind one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from passk_guard.utils.errors import GuardError


@dataclass(frozen=True)
class TokenBatch:
    """Prompt followed directly by completion, padded on the right; positions count 0, 1, 2, ...

    Where prompts are shared, more completions follow the first one in its row. Each of them attends to the prompt and
    to itself, and its positions continue those of the prompt.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64, 1 on tokens and 0 on padding.
        completion_mask: [B, T] int64, j on the tokens of a row's j-th completion, 0 elsewhere: 1 where there is one. -j
            on those tokens of it that the policy did not sample: they are read, and their log-probability counts not.
        slots: [N] int64, the row of the sketch that each completion adds to; -1: none. N = B without shared prompts.
        factors: [N] float64 by which the completions' scores are multiplied; None: 1 for each.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    slots: Tensor
    factors: Tensor | None = None

    @property
    def first(self) -> Tensor:
        """[B] the place in `slots` of each row's first completion."""
        counts = self.completion_mask.abs().amax(1).clamp(min=1)  # an empty completion is the only one of its row
        return counts.cumsum(0) - counts

    @property
    def row_slots(self) -> Tensor:
        """[B] slots of the rows, for a sketch: it adds the completions of a row up."""
        return self.slots[self.first.to(self.slots.device)]


def token_batches(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    slots: Sequence[int],
    *,
    max_tokens: int,
    pad_token_id: int,
    device: torch.device | str,
    groups: Sequence[int] | None = None,
    room: Callable[[int], int] = lambda prompt: 0,
    policy_masks: Sequence[Sequence[int]] | None = None,
) -> Iterator[TokenBatch]:
    """Batches of similar length with B T <= max_tokens each; a longer row gets a separate batch.

    Args:
        prompt_ids: prompt tokens of each sample, at least one.
        completion_ids: completion tokens of each sample.
        slots: row of the sketch for each sample; samples with slot -1 are dropped.
        max_tokens: padded tokens of a batch, > 0.
        pad_token_id: fills the padding.
        device: where the batches are put.
        groups: samples of one group and one prompt share a row; None: no row is shared.
        room: most completion tokens behind a prompt of so many tokens, where more than one completion is there.
        policy_masks: 1 for each completion token that the policy sampled, 0 for the others; None: it sampled all.

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
    kept = [i for i, slot in enumerate(slots) if slot != -1]
    if empty := [slots[i] for i in kept if not len(prompt_ids[i])]:
        raise GuardError(
            f"Expected at least one prompt token per sample; found an empty prompt in slot {empty[0]}. The first "
            "completion token is predicted from the last prompt token: start the prompt with a BOS token."
        )
    masks = [[1] * len(ids) for ids in completion_ids] if policy_masks is None else policy_masks
    signs = [[1 if sampled else -1 for sampled in mask] for mask in masks]
    rows = [_Row(list(prompt_ids[i]), [list(completion_ids[i])], [signs[i]], [int(slots[i])]) for i in kept]
    if groups is not None:
        rows = _side_by_side(rows, [groups[i] for i in kept], lambda prompt: min(room(prompt), max_tokens - prompt))
    return _collated(rows, max_tokens, pad_token_id, torch.device(device))


@dataclass
class _Row:
    """A prompt with its completions, the sign of each token in the completion mask, and the slot of each."""

    prompt: list[int]
    completions: list[list[int]] = field(default_factory=list)
    signs: list[list[int]] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    @property
    def behind(self) -> int:
        """Completion tokens."""
        return sum(map(len, self.completions))

    def __len__(self) -> int:
        return len(self.prompt) + self.behind


def _side_by_side(samples: list[_Row], groups: Sequence[int], room: Callable[[int], int]) -> list[_Row]:
    """The same samples in fewer rows; one with an empty completion keeps a row of its own."""
    rows, unfilled = list[_Row](), dict[tuple[int, tuple[int, ...]], _Row]()
    for sample, group in zip(samples, groups, strict=True):
        key = (group, tuple(sample.prompt))
        row = unfilled.get(key)
        if row is None or not sample.behind or row.behind + sample.behind > room(len(row.prompt)):
            rows.append(sample)
            if sample.behind:
                unfilled[key] = sample
        else:
            row.completions += sample.completions
            row.signs += sample.signs
            row.slots += sample.slots
    return rows


def _collated(rows: list[_Row], max_tokens: int, pad_token_id: int, device: torch.device) -> Iterator[TokenBatch]:
    # Longest first: the first batch needs the most memory, so that out of memory happens at once if at all.
    batch: list[_Row] = []
    for row in sorted(rows, key=len, reverse=True):
        if batch and len(batch[0]) * (len(batch) + 1) > max_tokens:
            yield _collate(batch, pad_token_id, device)
            batch = []
        batch.append(row)
    if batch:
        yield _collate(batch, pad_token_id, device)


def _collate(rows: list[_Row], pad_token_id: int, device: torch.device) -> TokenBatch:
    shape = (len(rows), max(map(len, rows)))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        tokens, numbers = list(row.prompt), [0] * len(row.prompt)
        for number, (completion, signs) in enumerate(zip(row.completions, row.signs, strict=True), 1):
            tokens += completion
            numbers += [number * sign for sign in signs]
        input_ids[i, : len(row)] = torch.tensor(tokens, dtype=torch.int64)
        attention_mask[i, : len(row)] = 1
        completion_mask[i, : len(row)] = torch.tensor(numbers, dtype=torch.int64)
    slots = torch.tensor([slot for row in rows for slot in row.slots], dtype=torch.int64)
    return TokenBatch(*(x.to(device) for x in (input_ids, attention_mask, completion_mask, slots)))


def _rows_of(batch: TokenBatch) -> list[_Row]:
    rows, slots = list[_Row](), iter(batch.slots.tolist())
    for ids, attended, numbers in zip(
        batch.input_ids.tolist(), batch.attention_mask.sum(1).tolist(), batch.completion_mask.tolist(), strict=True
    ):
        ids, numbers = ids[:attended], numbers[:attended]
        row = _Row([token for token, number in zip(ids, numbers, strict=True) if not number])
        for j in range(1, max(1, *map(abs, numbers)) + 1):
            row.completions.append([token for token, number in zip(ids, numbers, strict=True) if abs(number) == j])
            row.signs.append([1 if number > 0 else -1 for number in numbers if abs(number) == j])
            row.slots.append(next(slots))
        rows.append(row)
    return rows


def halves(batch: TokenBatch) -> tuple[TokenBatch, TokenBatch]:
    """The completions of a batch in two batches, in their order; the other half of a single one is a filler."""
    rows, pad, device = _rows_of(batch), int(batch.input_ids[0, 0]), batch.input_ids.device
    if len(rows) == 1 and len(rows[0].slots) > 1:
        (row,), middle = rows, -(-len(rows[0].slots) // 2)
        parts = [
            [_Row(row.prompt, row.completions[some], row.signs[some], row.slots[some])]
            for some in (slice(middle), slice(middle, None))
        ]
    else:
        parts = [rows[: -(-len(rows) // 2)], rows[-(-len(rows) // 2) :]]
    one, two = (
        _collate(part, pad, device) if part else filler_batch(pad_token_id=pad, device=device) for part in parts
    )
    if batch.factors is None:
        return one, two
    first, rest = batch.factors[: len(one.slots)], batch.factors[len(one.slots) :]
    return replace(one, factors=first), replace(two, factors=rest if len(rest) else first.new_ones(1))


def unshared(batch: TokenBatch) -> TokenBatch:
    """The same completions in the same order, each behind a prompt of its own."""
    rows = [
        _Row(row.prompt, [completion], [signs], [slot])
        for row in _rows_of(batch)
        for completion, signs, slot in zip(row.completions, row.signs, row.slots, strict=True)
    ]
    return _collate(rows, int(batch.input_ids[0, 0]), batch.input_ids.device)


def filler_batch(*, pad_token_id: int, device: torch.device | str) -> TokenBatch:
    """One sample of two tokens with slot -1, for a rank without samples.

    Sharded models gather their weights in every forward and backward, so that all ranks must run equally many.
    """
    return _collate([_Row([pad_token_id], [[pad_token_id]], [[1]], [-1])], pad_token_id, torch.device(device))


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
    _check_masks(attention_mask.bool(), completion_mask.long())
    if not (math.isfinite(temperature) and temperature > 0):
        raise GuardError(f"Expected `temperature` > 0; found {temperature}. Pass that of the sampling.")


def _check_masks(attended: Tensor, completion: Tensor) -> None:
    completion = completion.abs()
    before = completion.roll(1, 1)
    if not bool(attended[:, 0].all()) or bool((attended[:, 1:] & ~attended[:, :-1]).any()):
        raise GuardError(
            "Expected rows of `attention_mask` to be ones followed by zeros; found padding on the left or in "
            "between. Pass right-padded rows, one sample each (see `token_batches`); packed rows are refused."
        )
    if bool(((completion > 1) & (completion != before) & (completion != before + 1)).any()):
        raise GuardError(
            "Expected `completion_mask` to number the completions of a row 1, 2, ... side by side; found another "
            "order. Pass 0 and 1 for rows of one completion."
        )
    behind = completion.bool().cumsum(1).bool() & attended & (completion == 0)
    if bool((behind.any(1) & (completion.amax(1) > 1)).any()):
        raise GuardError(
            "Expected `completion_mask` other than 0 behind a shared prompt; found 0 between completions. Pass -j on "
            "tokens of completion j that the policy did not sample."
        )
    if bool((completion.bool() & ~attended).any()):
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
