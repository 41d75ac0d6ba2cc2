"""A run whose policy moves between refreshes, observed with kept rollouts and pooling as the callback does it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.calibration_reuse_draws import NOW, Draw, K, LogLinear, cosine_of, with_cosine
from passk_guard.callback.state import Memory
from passk_guard.config import GuardConfig
from passk_guard.estimation.estimate import estimate_pooled
from passk_guard.estimation.intervals import student_t_quantile

POOL = 3
REFRESHES = (1, 3, 5)
STEPS = (0.02, 0.05, 0.1)
LEAST = GuardConfig().min_effective_samples


class Observed:
    """What the guard remembers after the refreshes of one run, and what was true at each that it pools.

    `RolloutKeeper`'s rule: a draw serves `refreshes` looks, and a look below the least share is taken afresh.
    """

    def __init__(self, population: LogLinear, refreshes: int, generator: torch.Generator) -> None:
        self._population, self._refreshes, self._generator = population, refreshes, generator
        self._draw: Draw | None = None
        self._used = 0
        self.memory, self.share, self.early = Memory(), 1.0, 0

    def refresh(self, theta: Tensor, time: int) -> None:
        probe = None
        if self._draw is not None and self._used < self._refreshes:
            probe, self.share = self._draw.look(theta)
            self._used += 1
            if self.share < LEAST:
                probe, self.early = None, self.early + 1
        if probe is None:
            self._draw, self._used, self.share = Draw(self._population, theta, self._generator), 1, 1.0
            probe, _ = self._draw.look(theta, fresh=True)
        self.memory = self.memory.with_refresh(probe, POOL, time)

    @property
    def times(self) -> tuple[int, ...]:
        """Of the refreshes that are pooled; none is void here."""
        return self.memory.taken[-len(self.memory.pooled(POOL)) :]


def path(population: LogLinear, step: float) -> Callable[[int], Tensor]:
    """The policy `ago` refreshes before the newest: training goes straight up grad J_1."""
    ascent, _ = population.gradients(NOW)
    ascent = ascent / ascent.norm()
    return lambda ago: NOW - ago * step * ascent


def measure(cosine: float, refreshes: int, step: float, repetitions: int, seed: int) -> dict[str, float]:
    """One cell. Runs end in each phase of a draw in turn, with the pool full; all of them at the same newest policy."""
    population, generator = with_cosine(cosine), torch.Generator().manual_seed(seed)
    policy = path(population, step)
    exact = torch.stack([population.products(policy(ago)) for ago in range(POOL * refreshes)])
    truth, inner = cosine_of(exact[0]), float(exact[0, 0])
    lags, shares, early, cosines, held, held_pooled, held_inner, conflicts = 0.0, 0.0, 0, [], [], [], [], 0
    for i in range(repetitions):
        last = (POOL - 1) * refreshes + i % refreshes
        run = Observed(population, refreshes, generator)
        for time in range(last + 1):
            run.refresh(policy(last - time), time)
        pooled = cosine_of(exact[[last - time for time in run.times]].mean(0))
        lags, shares, early = lags + pooled - truth, shares + run.share, early + run.early
        estimate = estimate_pooled(run.memory.pooled(POOL), K)
        conflicts += estimate.status == "conflict"
        half = student_t_quantile(0.975, estimate.degrees or 1.0) * (estimate.inner_product_se or 0.0)
        held_inner.append(abs((estimate.inner_product or 0.0) - inner) <= half)
        if estimate.cosine is not None:
            cosines.append(estimate.cosine - truth)
            held.append(estimate.ci_low <= truth <= estimate.ci_high)
            held_pooled.append(estimate.ci_low <= pooled <= estimate.ci_high)
    off = torch.tensor(cosines, dtype=torch.float64)
    return {
        "cosine": round(truth, 3),
        "resample_refreshes": refreshes,
        "step": step,
        "repetitions": repetitions,
        "effective_samples": round(shares / repetitions, 3),
        "ended_early": round(early / repetitions, 3),
        "determined": len(held) / repetitions,
        "lag": round(lags / repetitions, 4),
        "cosine_bias": round(float(off.mean()), 4),
        "cosine_bias_error": round(float(off.std()) / len(off) ** 0.5, 4),
        "covered_95": round(sum(held) / len(held), 4),
        "covered_95_of_pool": round(sum(held_pooled) / len(held_pooled), 4),
        "inner_covered_95": round(sum(held_inner) / repetitions, 4),
        "conflict": conflicts / repetitions,
    }
