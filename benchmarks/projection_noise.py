"""What noise in the protected direction does to a projection, and what shrinking the projection would do.

    python -m benchmarks.projection_noise [--runs 48]

p = q + e estimates the gradient q of pass@1. Four rules for the coefficient c of g' = g + c p, rho = |q|^2 / |p|^2:

    hard     max(0, gamma |g||p| - <g, p>) / |p|^2          the guard's: the constraint is on p
    shrunk   max(0, gamma |g||q| - <g, p>) / |p|^2          posterior mean of the change that q asks for
    raised   max(0, gamma |g||q| - <g, p>) / (rho |p|^2)    E<g', q> = gamma |g||q| where the step is changed
    gated    hard where U_11 is significantly positive, else no change

The first table is Monte Carlo in 2,000 dimensions with rho known, beside the closed form of `mitigation/projection.py`.
The second trains: logistic prompts, easy ones against hard ones, pass@8 from 16 samples, 100 SGD steps, p from fresh
prompts every 5 steps, |q|^2 estimated by U_11, rho at least 0.2 in "raised". Means over runs with standard errors:
exact change of pass@1 at the end and at its lowest of five looks, of pass@8, and the mean U_11 / |p|^2.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from passk_guard.passk.closed_forms import sample_coefficients

GAMMA, K, SAMPLES, BATCH, STEPS, EVERY, RATE = 0.2, 8, 16, 24, 100, 5, 2.0
DIM, LEAST, QUANTILE = 24, 0.2, 1.645
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""From <g, p>, |g|, |p|^2, the reliability and whether U_11 is significant, [runs] each, to c."""


def _hard(inner: Tensor, norm_g: Tensor, p_sq: Tensor, *_: Tensor) -> Tensor:
    return (GAMMA * norm_g * p_sq.sqrt() - inner).clamp(min=0) / p_sq


def _shrunk(inner: Tensor, norm_g: Tensor, p_sq: Tensor, reliability: Tensor, _: Tensor) -> Tensor:
    return (GAMMA * norm_g * (reliability.clamp(min=0) * p_sq).sqrt() - inner).clamp(min=0) / p_sq


def _raised(inner: Tensor, norm_g: Tensor, p_sq: Tensor, reliability: Tensor, established: Tensor) -> Tensor:
    return _shrunk(inner, norm_g, p_sq, reliability, established) / reliability.clamp(min=LEAST)


def _gated(inner: Tensor, norm_g: Tensor, p_sq: Tensor, reliability: Tensor, established: Tensor) -> Tensor:
    return _hard(inner, norm_g, p_sq) * established


def _none(inner: Tensor, *_: Tensor) -> Tensor:
    return torch.zeros_like(inner)


RULES: dict[str, Rule] = {"none": _none, "hard": _hard, "shrunk": _shrunk, "raised": _raised, "gated": _gated}


def one_step(
    ratio: float, cosine: float, runs: int, generator: torch.Generator
) -> dict[str, tuple[float, float, float]]:
    """Of each rule: the means of <g', q> / |g||q|, of cos(g', q) and of |g' - true projection|^2 / |g|^2.

    Args:
        ratio: |q| / |e| for unit q. cosine: cos(g, q) for unit g. runs: draws of e, in 2,000 dimensions.
    """
    dim = 2000
    noise = torch.randn(runs, dim, generator=generator, dtype=torch.float64) / math.sqrt(dim) / ratio
    q, g = torch.zeros(2, dim, dtype=torch.float64)
    q[0], g[0], g[1] = 1.0, cosine, math.sqrt(1 - cosine**2)
    p, known = q + noise, torch.ones(runs, dtype=torch.float64)
    p_sq, target = p.square().sum(1), g + max(0.0, GAMMA - cosine) * q
    found = {}
    for name in ("none", "hard", "shrunk"):
        c = RULES[name](p @ g, known, p_sq, 1 / p_sq, known)
        after = g + c[:, None] * p
        gain, size, distance = after @ q, after.norm(dim=1), (after - target).square().sum(1)
        found[name] = (float(gain.mean()), float((gain / size).mean()), float(distance.mean()))
    return found


def closed_form(ratio: float, cosine: float) -> float:
    """<g', q> / |g||q| of the hard projection, to the first order."""
    reliability = ratio**2 / (1 + ratio**2)
    return (1 - reliability) * cosine + math.sqrt(reliability) * GAMMA


class Task:
    """Prompts x of three kinds with pass rates sigmoid(b_x + theta . phi_x); `runs` policies side by side.

    Easy (60%, pass rate .85) and hard (25%, .07) prompts have opposite features, neutral ones (15%, .38) their own.
    """

    def __init__(self, runs: int, spread: float) -> None:
        self.runs, self.spread = runs, spread
        self.means, self.bias = torch.zeros(3, DIM), torch.tensor([1.7, -2.6, -0.5])
        self.means[0, 0], self.means[1, 0], self.means[1, 1], self.means[2, 2] = 1.0, -0.8, 0.6, 1.0
        self.held_out = self.prompts(400, torch.Generator().manual_seed(99))

    def prompts(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features [runs, count, DIM] and biases [runs, count]."""
        drawn = torch.rand(self.runs, count, generator=generator)
        kind = (drawn > 0.6).long() + (drawn > 0.85).long()
        noise = torch.randn(self.runs, count, DIM, generator=generator)
        return self.means[kind] + self.spread / math.sqrt(DIM) * noise, self.bias[kind]

    def gradients(self, theta: Tensor, count: int, k: int, generator: torch.Generator) -> Tensor:
        """[runs, count, DIM] estimated gradients of pass@k of fresh prompts, from SAMPLES samples each."""
        features, bias = self.prompts(count, generator)
        rate = torch.sigmoid(bias + (features * theta[:, None]).sum(-1))
        right = torch.binomial(torch.full_like(rate, SAMPLES), rate, generator=generator)
        samples = torch.full_like(right, SAMPLES)
        positive, negative = (
            x.view_as(right).float() for x in sample_coefficients(samples.flatten().long(), right.flatten().long(), k)
        )
        return (positive * right * (1 - rate) - negative * (SAMPLES - right) * rate)[..., None] * features

    def rates(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """[runs] exact pass@1 and pass@K on held-out prompts."""
        features, bias = self.held_out
        rate = torch.sigmoid(bias + (features * theta[:, None]).sum(-1))
        return rate.mean(1), (1 - (1 - rate) ** K).mean(1)


def direction(each: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p [runs, DIM] of prompts' gradients [runs, m, DIM], |p|^2, U_11 / |p|^2, and whether U_11 is significant."""
    m = each.shape[1]
    kernel = each @ each.mT
    own = kernel.diagonal(dim1=1, dim2=2)
    p_sq = kernel.mean((1, 2)).clamp(min=1e-12)
    between = (kernel.sum((1, 2)) - own.sum(1)) / (m * (m - 1))
    spread = (2 * (kernel.square().sum((1, 2)) - own.square().sum(1))).sqrt() / (m * (m - 1))
    return each.mean(1), p_sq, between / p_sq, between > QUANTILE * spread


def train(task: Task, rule: Rule, prompts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[runs] change of pass@1, its lowest, change of pass@K, and mean reliability."""
    training, probing = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    theta = torch.zeros(task.runs, DIM)
    start, low, seen = task.rates(theta), torch.zeros(task.runs), []
    for step in range(STEPS):
        if step % EVERY == 0:
            p, p_sq, reliability, established = direction(task.gradients(theta, prompts, 1, probing))
            seen.append(reliability)
        g = task.gradients(theta, BATCH, K, training).mean(1)
        c = rule((g * p).sum(1), g.norm(dim=1), p_sq, reliability, established)
        theta = theta + RATE * (g + c[:, None] * p)
        if step % 20 == 19:
            end = task.rates(theta)
            low = torch.minimum(low, end[0] - start[0])
    return end[0] - start[0], low, end[1] - start[1], torch.stack(seen).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=48, help="policies of each row of the second table")
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print("| cos(g, q) | q/e | rho | hard: <g', q>, closed form | hard | shrunk | distance: none | hard | shrunk |")
    print("|---|---|---|---|---|---|---|---|---|")
    for cosine in (-0.3, 0.1):
        for ratio in (10.0, 1.0, 0.3, 0.1):
            found = one_step(ratio, cosine, 400, generator)
            cells = [f"{cosine:+.1f}", f"{ratio:g}", f"{ratio**2 / (1 + ratio**2):.2f}"]
            cells += [f"{closed_form(ratio, cosine):+.3f}", *(f"{found[name][0]:+.3f}" for name in ("hard", "shrunk"))]
            print("|", " | ".join(cells + [f"{found[name][2]:.3f}" for name in ("none", "hard", "shrunk")]), "|")
    print("\n| spread | prompts | rule | pass@1 | its lowest | pass@8 | reliability |\n|---|---|---|---|---|---|---|")
    for spread in (1.0, 4.0):
        task = Task(runs, spread)
        for prompts in (8, 24, 64):
            for name, rule in RULES.items():
                *changes, reliability = train(task, rule, prompts)
                means = [f"{x.mean():+.3f} ± {x.std() / math.sqrt(runs):.3f}" for x in changes]
                print(
                    f"| {spread:g} | {prompts} | {name} |",
                    " | ".join(means),
                    f"| {reliability.mean():.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
