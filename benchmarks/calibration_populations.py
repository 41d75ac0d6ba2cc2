"""Populations of prompts whose angle between grad J_k and grad J_1 is known, and draws from them by the thousand.

Synthetic: easy, hard and neutral prompts whose score vectors are (y - p) phi plus noise, in 48 dimensions. Real: the
per-completion score vectors of a model, kept as a pool that draws with replacement come from, so that the pool's own
angle is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.calibration_statistics import Draw
from passk_guard.passk.closed_forms import passk_weight

DIM = 48


class Population(Protocol):
    """Anything to draw refreshes from."""

    def cosine(self, k: int) -> float:
        """The true angle."""

    def draw(self, repetitions: int, m: int, n: int, generator: torch.Generator) -> Draw:
        """R refreshes of m independent prompts with n samples each, n even."""


@dataclass(frozen=True)
class Synthetic:
    """Three kinds of prompts; the hard ones' mean direction is `rho` along the easy ones'.

    Attributes:
        spread: of phi around its mean, from prompt to prompt.
        noise: of a sample's score vector.
        sketch_dim: size of a random projection the vectors went through; None for none.
        cluster: prompts in a row that are paraphrases of one: of one kind, with one phi.
    """

    rho: float
    spread: float = 0.3
    noise: float = 0.1
    sketch_dim: int | None = None
    cluster: int = 1
    bracket = (-0.99999, 0.99999)
    share = torch.tensor([0.7, 0.15, 0.15], dtype=torch.float64)
    rate = torch.tensor([0.85, 0.07, 0.2], dtype=torch.float64)

    @property
    def means(self) -> Tensor:
        axes = torch.eye(DIM, dtype=torch.float64)
        return torch.stack([axes[0], self.rho * axes[0] + math.sqrt(1 - self.rho**2) * axes[1], 0.5 * axes[2]])

    def cosine(self, k: int) -> float:
        g = (self.share * self.rate * (1 - self.rate))[:, None] * self.means
        one, many = g.sum(0), (passk_weight(self.rate, k)[:, None] * g).sum(0)
        return float(one @ many / one.norm() / many.norm())

    def draw(self, repetitions: int, m: int, n: int, generator: torch.Generator) -> Draw:
        return self.ask(*self.prompts(repetitions, m, generator), n, generator)

    def prompts(self, repetitions: int, m: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Kinds [R, m] and directions phi [R, m, d] of independent prompts."""
        apart = m // self.cluster
        kind = torch.multinomial(self.share, repetitions * apart, True, generator=generator).view(repetitions, apart)
        normal = torch.randn(repetitions, apart, DIM, dtype=torch.float64, generator=generator)
        phi = self.means[kind] + self.spread * normal
        return kind.repeat_interleave(self.cluster, 1), phi.repeat_interleave(self.cluster, 1)

    def ask(self, kind: Tensor, phi: Tensor, n: int, generator: torch.Generator) -> Draw:
        """A refresh of these prompts with n samples each."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        repetitions, m = kind.shape
        p = self.rate[kind].expand(2, repetitions, m)
        c = torch.binomial(torch.full_like(p, n // 2), p, generator=generator)
        positive = (c * (1 - p))[..., None] * phi + self.noise * c.sqrt()[..., None] * normal(2, repetitions, m, DIM)
        wrong = n // 2 - c
        negative = -(wrong * p)[..., None] * phi + self.noise * wrong.sqrt()[..., None] * normal(2, repetitions, m, DIM)
        if self.sketch_dim is not None:
            mixing = self._projection(repetitions, generator)[:, None]
            positive, negative = ((x.unsqueeze(-2) @ mixing).squeeze(-2) for x in (positive, negative))
        return Draw(c.long(), positive, negative, n // 2)

    def _projection(self, repetitions: int, generator: torch.Generator) -> Tensor:
        """[R, d, d] lower triangles L with L L^T = P P^T / dim in law, P Gaussian [d, dim] (Bartlett 1933)."""
        normal = torch.randn(repetitions, DIM, DIM, dtype=torch.float64, generator=generator)
        freedom = torch.arange(self.sketch_dim, self.sketch_dim - DIM, -1, dtype=torch.float64)
        chi2 = 2 * torch._standard_gamma(freedom.div(2).expand(repetitions, DIM), generator=generator)
        return (normal.tril(-1) + torch.diag_embed(chi2.sqrt())) / math.sqrt(self.sketch_dim)


class FewHard(Synthetic):
    """One prompt in twenty is hard: most of grad J_k rests on the two or three of them that a refresh sees solved."""

    share = torch.tensor([0.8, 0.05, 0.15], dtype=torch.float64)
    rate = torch.tensor([0.85, 0.05, 0.2], dtype=torch.float64)


class FewHardAlone(FewHard):
    """The same without neutral prompts, which have a part in grad J_k."""

    share = torch.tensor([0.95, 0.05, 0.0], dtype=torch.float64)


class ThreeKinds(Synthetic):
    """A tenth of the prompts is solved once in fifty samples and agrees with the easy ones: most samples miss them."""

    bracket = (-0.2, 0.0)
    share = torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64)
    rate = torch.tensor([0.93, 0.3, 0.02], dtype=torch.float64)
    aside, agreeing = 0.013, 0.33

    @property
    def means(self) -> Tensor:
        axes = torch.eye(DIM, dtype=torch.float64)
        return torch.stack([axes[0], self.rho * axes[0] + self.aside * axes[1], self.agreeing * axes[0]])


class RareAgree(ThreeKinds):
    """One prompt in twenty is solved once in twenty samples, and carries what agrees."""

    bracket = (-0.5, 0.0)
    share = torch.tensor([0.55, 0.4, 0.05], dtype=torch.float64)
    rate = torch.tensor([0.9, 0.3, 0.05], dtype=torch.float64)
    aside, agreeing = 0.1, 1.0


class RarestAgree(RareAgree):
    """One prompt in thirty-three is solved once in fifty samples: three in five checks of 64 see none of it."""

    share = torch.tensor([0.57, 0.4, 0.03], dtype=torch.float64)
    rate = torch.tensor([0.9, 0.3, 0.02], dtype=torch.float64)


class TwoKinds(ThreeKinds):
    """Easy and half-hard prompts whose gradients nearly cancel in grad J_1."""

    bracket = (-0.3, -1.0)
    share = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    rate = torch.tensor([0.9, 0.2, 0.5], dtype=torch.float64)
    aside = 0.1


def with_cosine(cosine: float, k: int, make: type[Synthetic] = Synthetic, **settings: Any) -> Synthetic:
    """The synthetic population with this angle at k, by bisection over the hard prompts' direction."""
    low, high = make.bracket
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if make(middle).cosine(k) < cosine else (low, middle)
    return make(low, **settings)


@dataclass(frozen=True)
class Pool:
    """N prompts with S completions each; the population is these prompts and, for each, these completions.

    The score vectors of a prompt are taken around their mean, as score vectors of a policy are: then the expectation
    of the leave-one-out gradient of pass@k is exactly w_k(p) mean_i r_i s_i with p the share of right ones.

    Attributes:
        scores: [N, S, d] float32, their mean over S is zero.
        right: [N, S] of 0/1.
    """

    scores: Tensor
    right: Tensor

    def cosine(self, k: int) -> float:
        gradient = torch.einsum("ns,nsd->nd", self.right.double(), self.scores.double()) / self.right.shape[1]
        p = self.right.double().mean(1)
        one, many = gradient.mean(0), (passk_weight(p, k)[:, None] * gradient).mean(0)
        return float(one @ many / one.norm() / many.norm())

    def draw(self, repetitions: int, m: int, n: int, generator: torch.Generator) -> Draw:
        size, samples, dim = self.scores.shape
        prompt = torch.randint(size, (repetitions, m, 1), generator=generator)
        picked = torch.randint(samples, (2, repetitions, m, n // 2), generator=generator)
        right = self.right[prompt, picked].float()
        rows = self.scores.view(-1, dim)
        flat = (prompt * samples + picked).view(-1, n // 2)
        positive, negative = (
            torch.nn.functional.embedding_bag(flat, rows, per_sample_weights=w.view(flat.shape), mode="sum")
            .view(2, repetitions, m, dim)
            .double()
            for w in (right, 1 - right)
        )
        return Draw(right.sum(-1).long(), positive, negative, n // 2)
