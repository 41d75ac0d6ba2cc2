"""Synthetic populations of prompts with a known angle, and an independent oracle for the U-statistics."""

import math
from dataclasses import dataclass

import torch

from passk_guard import ProbeGram, passk_weight

DIM = 48


@dataclass
class Population:
    """Prompts of three types: easy, hard and neutral; scores (y - p) phi plus noise, phi around the type's mean."""

    share: torch.Tensor
    pass_rate: torch.Tensor
    means: torch.Tensor
    spread: float
    noise: float
    cosine: float


def population(cosine, *, k=8, spread=0.3, noise=0.1):
    """A population whose true cos(grad J_k, grad J_1) is `cosine`, by bisection on the hard prompts' direction."""
    share = torch.tensor([0.7, 0.15, 0.15], dtype=torch.float64)
    pass_rate = torch.tensor([0.85, 0.07, 0.2], dtype=torch.float64)
    axes = torch.eye(DIM, dtype=torch.float64)

    def means(rho):
        return torch.stack([axes[0], rho * axes[0] + math.sqrt(1 - rho**2) * axes[1], 0.5 * axes[2]])

    def cos(rho):
        g = (share * pass_rate * (1 - pass_rate))[:, None] * means(rho)
        g1, gk = g.sum(0), (passk_weight(pass_rate, k)[:, None] * g).sum(0)
        return float(g1 @ gk / g1.norm() / gk.norm())

    low, high = -0.99999, 0.99999
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cos(middle) < cosine else (low, middle)
    return Population(share, pass_rate, means(low), spread, noise, cos(low))


def true_moments(pop, k):
    """(U_k1, U_11, U_kk) of the whole population."""
    g = (pop.share * pop.pass_rate * (1 - pop.pass_rate))[:, None] * pop.means
    g1, gk = g.sum(0), (passk_weight(pop.pass_rate, k)[:, None] * g).sum(0)
    return torch.stack([gk @ g1, g1 @ g1, gk @ gk])


def draw(pop, m, n, generator, cluster=1):
    """One refresh of m fresh prompts with n samples each; `cluster` prompts in a row are paraphrases of one."""
    return ask(pop, choose(pop, m, generator, cluster), n, generator)


def choose(pop, m, generator, cluster=1):
    """Kinds [m] and directions [m, DIM] of m prompts."""
    kind = torch.multinomial(pop.share, m // cluster, replacement=True, generator=generator)
    phi = pop.means[kind] + pop.spread * torch.randn(m // cluster, DIM, dtype=torch.float64, generator=generator)
    return tuple(x.repeat_interleave(cluster, 0) for x in (kind, phi))


def ask(pop, prompts, n, generator, keys=()):
    """One refresh of these prompts with n samples each."""

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    (kind, phi), m = prompts, len(prompts[0])
    p = pop.pass_rate[kind]
    c = torch.binomial(torch.full((m,), float(n), dtype=torch.float64), p, generator=generator)
    positive = (c * (1 - p))[:, None] * phi + pop.noise * c.sqrt()[:, None] * normal(m, DIM)
    negative = -((n - c) * p)[:, None] * phi + pop.noise * (n - c).sqrt()[:, None] * normal(m, DIM)
    sums = torch.cat([positive, negative])
    return ProbeGram(sums @ sums.T, torch.full((m,), n), c.long(), keys)
