"""Log-linear policies whose pass@k gradients are exact, and completions of an earlier one looked at by a later one."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from passk_guard.estimation.records import ProbeGram
from passk_guard.passk.closed_forms import passk_weight
from passk_guard.passk.importance import effective_share, miss_estimates

PROMPTS, ANSWERS, DIM, M, N, K = 600, 32, 24, 64, 16, 8
NOW = torch.zeros(DIM, dtype=torch.float64)
"""The newest policy of every cell, at which the cosine is the one asked for."""


class LogLinear:
    """Easy prompts (70%) and hard ones, whose right answers lie along `angle` to those of the easy ones."""

    def __init__(self, angle: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(PROMPTS, ANSWERS, DIM, generator=generator, dtype=torch.float64)
        self.right = torch.zeros(PROMPTS, ANSWERS, dtype=torch.bool)
        hard = torch.arange(PROMPTS) >= 0.7 * PROMPTS
        self.right[~hard, :24], self.right[hard, :2] = True, True
        axis = torch.zeros(PROMPTS, DIM, dtype=torch.float64)
        axis[~hard, 0], axis[hard, 0], axis[hard, 1] = 1.0, math.cos(angle), math.sin(angle)
        self.features += 2.0 * torch.where(self.right[..., None], axis[:, None], 0.0)

    def policy(self, theta: Tensor, prompts: Tensor | slice = slice(None)) -> Tensor:
        return (self.features[prompts] @ theta).softmax(1)

    def scores(self, theta: Tensor, prompts: Tensor | slice = slice(None)) -> Tensor:
        features, policy = self.features[prompts], self.policy(theta, prompts)
        return features - (policy[..., None] * features).sum(1, keepdim=True)

    def gradients(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The exact grad J_1 and grad J_8, [DIM] each."""
        reward = self.policy(theta) * self.right
        gradient = (reward[..., None] * self.scores(theta)).sum(1)
        return gradient.mean(0), (passk_weight(reward.sum(1), K)[:, None] * gradient).mean(0)

    def products(self, theta: Tensor) -> Tensor:
        """[3] the exact <grad J_8, grad J_1>, |grad J_1|^2, |grad J_8|^2."""
        one, many = self.gradients(theta)
        return torch.stack([one @ many, one @ one, many @ many])


def cosine_of(products: Tensor) -> float:
    return float(products[0] / (products[1] * products[2]).sqrt())


@lru_cache
def with_cosine(cosine: float) -> LogLinear:
    """The population with this cosine at `NOW`, by bisection."""
    low, high = 0.0, math.pi
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cosine_of(LogLinear(middle).products(NOW)) > cosine else (low, middle)
    return LogLinear(low)


class Draw:
    """16 completions each of 64 prompts, from the policy at `theta`."""

    def __init__(self, population: LogLinear, theta: Tensor, generator: torch.Generator) -> None:
        self._population = population
        self._prompts = torch.randint(PROMPTS, (M,), generator=generator)
        self._policy = population.policy(theta, self._prompts)
        self._answers = torch.multinomial(self._policy, N, True, generator=generator)
        self._right = population.right[self._prompts[:, None], self._answers]

    def look(self, theta: Tensor, *, fresh: bool = False) -> tuple[ProbeGram, float]:
        """The refresh that the policy at `theta` makes of them, and their effective share, as the guard takes it."""
        rows = torch.arange(M)[:, None]
        present = self._population.policy(theta, self._prompts)
        log_ratios = (present.log() - self._policy.log())[rows, self._answers]
        scores = self._population.scores(theta, self._prompts)[rows, self._answers] * log_ratios.exp()[..., None]
        right, c = self._right, self._right.sum(1)
        sums = torch.cat([(scores * right[..., None]).sum(1), (scores * ~right[..., None]).sum(1)])
        n = torch.full((M,), N)
        share = effective_share(log_ratios, torch.ones_like(right))[(c > 0) & (c < n)].mean()
        misses = None if fresh else miss_estimates(log_ratios, ~right, n)
        return ProbeGram(sums @ sums.T, n, c, self._prompts.tolist(), misses), float(share)
