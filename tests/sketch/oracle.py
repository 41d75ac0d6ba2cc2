"""Brute force: each completion alone, without padding, its gradient by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def ragged_batch(seed: int = 0, samples: int = 6, vocab: int = 76, slots: list[int] | None = None) -> dict[str, Tensor]:
    """Right-padded random samples of different lengths, as the arguments of `ScoreSketcher.sketch`."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 5, (samples,), generator=generator)
    completions = torch.randint(1, 7, (samples,), generator=generator)
    lengths = prompts + completions
    position = torch.arange(int(lengths.max()))
    attended = position < lengths[:, None]
    tokens = torch.randint(0, vocab, attended.shape, generator=generator)  # 0, the padding token, among them
    return {
        "input_ids": torch.where(attended, tokens, 0),
        "attention_mask": attended.long(),
        "completion_mask": (attended & (position >= prompts[:, None])).long(),
        "slots": torch.tensor(slots if slots is not None else list(range(samples))),
    }


def log_prob(model: Any, tokens: Tensor, completion: Tensor, temperature: float) -> Tensor:
    """log pi of one completion, tokens [T] and completion mask [T]."""
    output = model(input_ids=tokens[None], attention_mask=torch.ones_like(tokens)[None])
    logits = getattr(output, "logits", output)[0, :-1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_p = (wide / temperature).log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)
    return log_p[completion[1:].bool()].sum()


def oracle_sketch(model: Any, batch: dict[str, Tensor], num_slots: int, temperature: float = 1.0) -> Tensor:
    """[num_slots, trainable scalars] in the order of `named_parameters`; dropout off, flags restored."""
    flags = [(m, m.training) for m in model.modules()]
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = torch.zeros(num_slots, sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
    for tokens, attended, completion, slot in zip(*batch.values(), strict=True):
        if slot >= 0:
            length = int(attended.sum())
            value = log_prob(model, tokens[:length], completion[:length], temperature)
            value.backward()  # not autograd.grad, which reentrant checkpointing refuses
            rows[slot] += torch.cat([(0 * p if p.grad is None else p.grad).flatten() for p in parameters]).detach()
            model.zero_grad()
    for module, training in flags:
        module.training = training
    return rows


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest row-wise |found - expected| / |expected|."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)).max())
