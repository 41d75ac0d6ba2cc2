"""Logits that are not finite, noticed without stopping the generation in its middle."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from passk_guard.utils.errors import VoidRefresh


class FiniteLogits(LogitsProcessor):
    """Puts 0 where a logit is NaN or +inf, remembers that there was one, and leaves finite ones as they are.

    Drawing a token from NaN raises on a CPU and ends the process on a GPU; and a rank that stops within a generation
    leaves the others waiting wherever weights are sharded. So the generation goes on, and `check` speaks at its end.
    """

    def __init__(self) -> None:
        self._bad: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Finite scores [B, V] of the next token."""
        bad = scores.isnan() | scores.isposinf()
        found = bad.any()
        self._bad = found if self._bad is None else self._bad | found
        return torch.where(bad, torch.zeros_like(scores), scores)

    def check(self) -> None:
        """Raise VoidRefresh when a logit was not finite since this was made."""
        if self._bad is not None and bool(self._bad):
            raise VoidRefresh("the model's logits are not finite: completions cannot be sampled from them")
