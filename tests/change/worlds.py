"""Policies over a few completions of many prompts, with exact pass rates, and draws from them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class World:
    """M prompts with V completions each: which are right, and logits that updates move."""

    right: Tensor
    logits: Tensor

    @classmethod
    def random(cls, prompts: int = 2000, completions: int = 10, *, seed: int = 0) -> World:
        g = torch.Generator().manual_seed(seed)
        right = torch.rand(prompts, completions, generator=g) < 0.3
        noise = torch.randn(prompts, completions, generator=g, dtype=torch.float64)
        ease = 2 * torch.randn(prompts, 1, generator=g, dtype=torch.float64) - 0.5
        return cls(right, noise + right * ease)

    def moved(self, size: float, drift: float, generator: torch.Generator) -> World:
        """Every logit moves by noise of this size, and those of right completions by `drift` as well."""
        noise = torch.randn(self.logits.shape, generator=generator, dtype=torch.float64)
        return World(self.right, self.logits + size * noise + drift * self.right)

    @property
    def log_probs(self) -> Tensor:
        return self.logits.log_softmax(1)

    @property
    def rates(self) -> Tensor:
        return (self.log_probs.exp() * self.right).sum(1)

    def passed(self, k: int) -> float:
        return float((1 - (1 - self.rates) ** k).mean())

    def draw(self, m: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts [m], their completions [m, n] and verdicts [m, n]."""
        rows = torch.randint(len(self.right), (m,), generator=generator)
        samples = torch.multinomial(self.log_probs[rows].exp(), n, replacement=True, generator=generator)
        return rows, samples, self.right[rows].gather(1, samples).long()

    def log_ratios(self, to: World, rows: Tensor, samples: Tensor) -> Tensor:
        return (to.log_probs - self.log_probs)[rows].gather(1, samples)


def every_draw(probabilities: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """[V^n, n] all that n samples can be, and [V^n] how likely."""
    draws = torch.tensor(list(itertools.product(range(len(probabilities)), repeat=n)))
    return draws, probabilities[draws].prod(1)
