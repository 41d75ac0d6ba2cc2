"""Is the estimate calibrated where the completions are those of an earlier policy? By how far the policy has moved.

    python -m benchmarks.calibration_reuse [--repetitions 400] [--results runs/calibration_reuse.jsonl]

Prompts with 32 possible answers each, log-linear policies exp(phi . theta): the population of 600 prompts, so that the
cosine of the present policy is exact. Completions are drawn from a policy displaced by `shift` times a random direction
and reweighted (64 prompts x 16, k = 8, one draw); every cell is about the same present policy, and so the same truth.
"shift 0" is fresh sampling. JSON lines: the mean effective share, bias, 95% coverage, share called a conflict by the
one-sided 95% test, and the root mean square error of the inner product.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from passk_guard.estimator import estimate_pooled
from passk_guard.importance import effective_share, miss_estimates
from passk_guard.passk import passk_weight
from passk_guard.types import ProbeGram

PROMPTS, ANSWERS, DIM, M, N, K = 600, 32, 24, 64, 16, 8
SHIFTS = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)


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

    def policy(self, theta: Tensor) -> Tensor:
        return (self.features @ theta).softmax(1)

    def scores(self, theta: Tensor) -> Tensor:
        policy = self.policy(theta)
        return self.features - (policy[..., None] * self.features).sum(1, keepdim=True)

    def products(self, theta: Tensor) -> tuple[float, float]:
        """The exact inner product and cosine of grad J_8 and grad J_1."""
        reward = self.policy(theta) * self.right
        gradient = (reward[..., None] * self.scores(theta)).sum(1)
        one = gradient.mean(0)
        many = (passk_weight(reward.sum(1), K)[:, None] * gradient).mean(0)
        return float(one @ many), float(one @ many / one.norm() / many.norm())


def with_cosine(cosine: float) -> LogLinear:
    """The population with this angle at theta = 0, by bisection."""
    low, high = 0.0, math.pi
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if LogLinear(middle).products(torch.zeros(DIM).double())[1] > cosine else (low, middle)
        )
    return LogLinear(low)


def look(population: LogLinear, shift: float, generator: torch.Generator) -> tuple[ProbeGram, float]:
    """One refresh, and what its samples are worth."""
    now = torch.zeros(DIM, dtype=torch.float64)
    direction = torch.randn(DIM, generator=generator, dtype=torch.float64)
    drawn, present = population.policy(now - shift * direction / direction.norm()), population.policy(now)
    prompt = torch.randint(PROMPTS, (M,), generator=generator)
    answers = torch.multinomial(drawn[prompt], N, True, generator=generator)
    right = population.right[prompt[:, None], answers]
    log_ratios = (present.log() - drawn.log())[prompt[:, None], answers]
    scores = population.scores(now)[prompt[:, None], answers] * log_ratios.exp()[..., None]
    sums = torch.cat([(scores * right[..., None]).sum(1), (scores * ~right[..., None]).sum(1)])
    n, c = torch.full((M,), N), right.sum(1)
    share = effective_share(log_ratios, torch.ones_like(right))[(c > 0) & (c < n)].mean()
    misses = miss_estimates(log_ratios, ~right, n) if shift else None
    return ProbeGram(sums @ sums.T, n, c, prompt.tolist(), misses), float(share)


def measure(cosine: float, shift: float, repetitions: int, seed: int) -> dict[str, float]:
    """One cell."""
    population, generator = with_cosine(cosine), torch.Generator().manual_seed(seed)
    inner, truth = population.products(torch.zeros(DIM, dtype=torch.float64))
    shares, errors, cosines, held, conflicts = [], [], [], [], 0
    for _ in range(repetitions):
        probe, share = look(population, shift, generator)
        estimate = estimate_pooled([probe], K)
        shares.append(share)
        errors.append((estimate.inner_product or 0.0) - inner)
        conflicts += estimate.status == "conflict"
        if estimate.cosine is not None:
            cosines.append(estimate.cosine - truth)
            held.append(estimate.ci_low <= truth <= estimate.ci_high)
    off = torch.tensor(errors, dtype=torch.float64)
    return {
        "cosine": round(truth, 3),
        "shift": shift,
        "repetitions": repetitions,
        "effective_samples": round(sum(shares) / len(shares), 3),
        "determined": len(held) / repetitions,
        "inner_bias_in_errors": round(float(off.mean() / off.std() * repetitions**0.5), 2),
        "inner_rms": float(off.square().mean().sqrt()),
        "cosine_bias": round(sum(cosines) / max(1, len(cosines)), 4),
        "covered_95": round(sum(held) / max(1, len(held)), 4),
        "conflict": conflicts / repetitions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--results", type=Path, default=Path("runs/calibration_reuse.jsonl"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    with given.results.open("w") as file:
        for cosine in (0.0, -0.4):
            for i, shift in enumerate(SHIFTS):
                record = measure(cosine, shift, given.repetitions, i)
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(json.dumps(record))


if __name__ == "__main__":
    main()
