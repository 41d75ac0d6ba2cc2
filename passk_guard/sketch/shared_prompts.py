"""Several completions side by side behind one prompt: what each token attends to, its position, and who predicts it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def shares_prompts(completion_mask: Tensor) -> bool:
    """Whether a row holds several completions: `completion_mask` [B, T] numbers them, see `TokenBatch`."""
    return int(completion_mask.abs().max()) > 1


def predictions(completion_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, position and predicting position [M] each of the completion tokens that the policy sampled.

    A token is predicted at the position before it; the first one of every completion at the end of the prompt.
    """
    row, position = completion_mask.gt(0).nonzero(as_tuple=True)
    number, before = completion_mask[row, position], completion_mask[row, position - 1].abs()
    end = completion_mask.ne(0).to(torch.uint8).argmax(1) - 1  # of the prompt
    return row, position, torch.where((number > 1) & (number != before), end[row], position - 1)


def shared_positions(attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
    """[B, T] position ids: each completion continues those of the prompt; 0 on padding."""
    completion_mask = completion_mask.abs()
    place = torch.arange(completion_mask.shape[1], device=completion_mask.device)
    starts = nn.functional.pad(completion_mask.diff(dim=1).ne(0), (1, 0)) * place
    prompt = (attention_mask.bool() & (completion_mask == 0)).sum(1, keepdim=True)
    positions = torch.where(completion_mask > 0, place - starts.cummax(1).values + prompt, place)
    return positions * attention_mask.bool()


def shared_attention(attention_mask: Tensor, completion_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T], to be added to the attention scores: each completion attends to the prompt and to itself.

    Args:
        attention_mask, completion_mask: [B, T], as of `TokenBatch`.
        dtype: of the model's hidden states.
    """
    completion_mask = completion_mask.abs()
    place = torch.arange(completion_mask.shape[1], device=completion_mask.device)
    query, key = completion_mask[:, :, None], completion_mask[:, None, :]
    seen = ((key == 0) | (key == query)) & attention_mask.bool()[:, None, :] & (place <= place[:, None])
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
