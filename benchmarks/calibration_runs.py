"""Whole runs of checks: how often a run without a conflict is called one, and how soon one is found, by each rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from benchmarks.calibration_populations import RareAgree, RarestAgree, Synthetic, ThreeKinds, TwoKinds, with_cosine
from benchmarks.calibration_statistics import checks_of, guard, pool
from passk_guard.change.cumulate import CurveSums, sequence_width
from passk_guard.estimation.evidence import Check, RunEvidence, conflict_check, log_evidence
from passk_guard.estimation.gram import checked_probe
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.estimation.records import ConflictEstimate, ProbeGram
from passk_guard.estimation.ustatistics import Moments
from passk_guard.estimation.verdict import DecisionRule, DecisionState, step

EACH_LOOK = DecisionRule(patience=2, cooldown=3)
POOLED = 3


@dataclass(frozen=True)
class Course:
    """How the cosine goes over a run of looks at the default probe (64 prompts x 16, k = 8, 3 refreshes pooled)."""

    name: str
    looks: int
    cosine: Callable[[int], float]
    begins: int | None = 0  # the look at which there is a conflict; None: never

    def at(self, look: int) -> float:
        return round(self.cosine(look), 2)


COURSES = (
    Course("no conflict, 40 looks", 40, lambda look: 0.0, None),
    Course("-0.6, drifting to 0 over 20 looks", 40, lambda look: min(0.0, -0.6 + 0.03 * look)),
    *(Course(f"cosine {c:g} from the start", 40, lambda look, c=c: c) for c in (-0.1, -0.2, -0.4, -0.8)),
    Course("0.3 for 20 looks, then -0.4", 60, lambda look: 0.3 if look < 20 else -0.4, 20),
)


@dataclass(frozen=True)
class Quiet:
    """A population without a conflict, asked at every check with m fresh prompts: what the evidence makes of it.

    `DRAWN` checks are drawn, their mean is set to the true one, 0, and runs are put together from them at random.
    """

    name: str
    make: Callable[[], Synthetic]
    m: int = 64


DRAWN = 4000
KINDS = (
    ("as in the table above", Synthetic, (0.3,)),
    ("three kinds", ThreeKinds, (0.02, 0.1, 0.3)),
    ("two kinds", TwoKinds, (0.02, 0.1)),
    ("rare hard prompts agree", RareAgree, (0.02, 0.1)),
    ("rarest hard prompts agree", RarestAgree, (0.02,)),
)
QUIET = tuple(
    Quiet(
        f"{name}, spread {spread:g}" + (f", {m} prompts" if m != 64 else "") + (", in fours" if cluster > 1 else ""),
        partial(with_cosine, 0.0, 8, make, spread=spread, cluster=cluster),
        m,
    )
    for m, cluster in ((64, 1), (16, 1), (64, 4))
    for name, make, spreads in KINDS
    for spread in (spreads if (m, cluster) == (64, 1) else spreads[:1])
    if (m, cluster) == (64, 1) or make is not RarestAgree
)


def measure_quiet(cell: Quiet, runs: int, looks: tuple[int, ...], seed: int) -> list[dict[str, Any]]:
    """A record for each length of a run: the share of runs that the evidence ever calls a conflict at 5%.

    Prompts in fours have no known mean, since pairs of one four count as different prompts: it stays as it is.
    """
    generator, population = torch.Generator().manual_seed(seed), cell.make()
    rows: list[tuple[float, float, float]] = []
    while len(rows) < DRAWN:
        moments = guard(population.draw(250, cell.m, 16, generator), 8)
        rows += [(c.value, c.variance, c.count) for c in checks_of(moments) if c.variance > 0]
    values, variances, counts = torch.tensor(rows, dtype=torch.float64).T
    if population.cluster == 1:
        values = values - values.mean()
    picked = torch.randint(len(rows), (runs, max(looks)), generator=generator)
    first = first_alarms(values[picked], variances[picked], counts[picked])
    return [
        {"course": cell.name, "looks": t, "rule": "whole run", "runs": runs}
        | {"false_alarms": round(float((first <= t).double().mean()), 4), "found": None, "median_delay": None}
        for t in looks
    ]


@dataclass(frozen=True)
class FewGain:
    """Windows of m fresh prompts in which pass@1 stays: a share of the prompts gain what the others lose.

    Each of the others changes by -1, give or take 0.3, the unit does not matter. Windows that miss the few show a
    fall, and a small error.
    """

    share: float
    m: int = 64

    @property
    def name(self) -> str:
        return f"{100 * self.share:g}% of {self.m} prompts gain what the others lose"

    def changes(self, runs: int, looks: int, generator: torch.Generator) -> Tensor:
        """[runs, looks, m] of mean 0."""
        shape = (runs, looks, self.m)
        few = torch.rand(shape, generator=generator, dtype=torch.float64) < self.share
        noise = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.where(few, 1 / self.share - 1, -1.0) + noise


FEW_GAIN = tuple(
    FewGain(share, m) for share, m in ((0.1, 64), (0.05, 64), (0.03, 64), (0.02, 64), (0.1, 16), (0.05, 16))
)


def window_moments(changes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[...] mean, variance of the mean and its degrees of freedom for [..., m] changes, as of a `ChangeEstimate`."""
    m, square = changes.shape[-1], (changes - changes.mean(-1, keepdim=True)).square()
    spread = square.var(-1, correction=0) / square.mean(-1).square()
    return changes.mean(-1), changes.var(-1) / m, (2 * m / spread).clamp(min=3, max=m - 1)


def measure_few_gain(cell: FewGain, runs: int, looks: int, seed: int) -> list[dict[str, Any]]:
    """Share of runs in which LOSING begins, and in which the summed change leaves its 95% sequence downwards."""
    change, variance, degrees = window_moments(cell.changes(runs, looks, torch.Generator().manual_seed(seed)))
    found = {
        "LOSING": int(first_alarms(-change, variance, degrees).isfinite().sum()),
        "total below 0 by its sequence": sum(
            _ever_below(zip(*run, strict=True))
            for run in zip(change.tolist(), variance.sqrt().tolist(), degrees.tolist(), strict=True)
        ),
    }
    return [
        {"course": cell.name, "looks": looks, "rule": rule, "runs": runs}
        | {"false_alarms": round(alarms / runs, 4), "found": None, "median_delay": None}
        for rule, alarms in found.items()
    ]


def _ever_below(windows: Iterator[tuple[float, float, float]]) -> bool:
    """Whether the sum of (change, standard error, degrees) is ever established to be below 0 by its sequence."""
    sums = CurveSums()
    for window in windows:
        sums = sums.plus(*window)
        if sums.total < -sequence_width(sums.variance, sums.unit, 0.05, sums.degrees):
            return True
    return False


@dataclass(frozen=True)
class Recurring:
    """A probe set of `size` prompts, of which every check asks m again in the guard's order, with new samples."""

    name: str
    make: Callable[[], Synthetic]
    size: int
    m: int = 64


RECURRING = (
    Recurring(
        "64 prompts again and again, as in the table above, spread 0.3, cosine 0",
        partial(with_cosine, 0.0, 8, Synthetic, spread=0.3),
        64,
    ),
)


def recurring_probes(cell: Recurring, looks: int, generator: torch.Generator) -> list[ProbeGram]:
    """One run: the set is drawn once, and every walk through it has an order of its own."""
    population, probes = cell.make(), []
    kind, phi = population.prompts(1, cell.size, generator)
    for look in range(looks):
        place = look % (cell.size // cell.m)
        if place == 0:
            order = torch.randperm(cell.size, generator=generator)
        chosen = order[place * cell.m : (place + 1) * cell.m]
        draw = population.ask(kind[:, chosen], phi[:, chosen], 16, generator)
        sums = torch.cat([draw.positive.sum(0)[0], draw.negative.sum(0)[0]])
        counts = torch.full((cell.m,), 16), draw.correct.sum(0)[0]
        probes.append(ProbeGram(sums @ sums.T, *counts, chosen.tolist()))
    return probes


def measure_recurring(cell: Recurring, runs: int, looks: int, seed: int) -> list[dict[str, Any]]:
    """Shares of runs that are called a conflict at 5%, by the evidence and as if every check had new prompts."""
    generator = torch.Generator().manual_seed(seed)
    called = {"whole run": 0, "whole run, prompts taken for new": 0}
    conflict = cell.make().cosine(8) < -0.01
    for _ in range(runs):
        probes = [checked_probe(probe, 8) for probe in recurring_probes(cell, looks, generator)]
        checks = [conflict_check(probe, 8, share=cell.m / cell.size) for probe in probes]
        new = [None if check is None else replace(check, share=0.0) for check in checks]
        for rule, found in zip(called, (checks, new), strict=True):
            steps = accumulate(found, RunEvidence.with_check, initial=RunEvidence())
            called[rule] += min(evidence.p_value for evidence in steps) <= 0.05
    return [
        {"course": cell.name, "looks": looks, "rule": rule, "runs": runs}
        | {"false_alarms": 0.0 if conflict else found / runs, "found": found / runs if conflict else None}
        | {"median_delay": None}
        for rule, found in called.items()
    ]


def first_alarms(values: Tensor, variances: Tensor, counts: Tensor, alpha: float = 0.05) -> Tensor:
    """[R] the check at which each of R runs is first called a conflict, inf where never; all given are [R, t]."""
    first = torch.full(values.shape[:1], torch.inf, dtype=torch.float64)
    for t in range(1, values.shape[1] + 1):
        going = first.isinf().nonzero().flatten()
        found = log_evidence(*(x[going, :t] for x in (values, variances, counts))) >= -math.log(alpha)
        first[going[found]] = t
    return first


def measure(course: Course, runs: int, seed: int) -> list[dict[str, Any]]:
    """A record for each rule: share of runs that say CONFLICT (before it begins, and at all), and the median delay."""
    looks = list(_looks_of_each_run(course, runs, seed))
    checks = torch.tensor([[[c.value, c.variance, c.count] for _, c in run] for run in looks], dtype=torch.float64)
    first: dict[str, list[int | None]] = {
        "each look, patience 2": [_first_conflict([estimate for estimate, _ in run]) for run in looks],
        "whole run": [None if t == math.inf else int(t) - 1 for t in first_alarms(*checks.movedim(2, 0)).tolist()],
    }
    begins = course.looks if course.begins is None else course.begins
    records: list[dict[str, Any]] = []
    for name, found in first.items():
        delays = sorted(look - begins + 1 for look in found if look is not None and look >= begins)
        missed = sum(look is None for look in found)
        records.append(
            {
                "course": course.name,
                "looks": course.looks,
                "rule": name,
                "runs": runs,
                "false_alarms": round(sum(look is not None and look < begins for look in found) / runs, 4),
                "found": None if course.begins is None else round(len(delays) / runs, 4),
                "median_delay": None if not delays or missed > runs / 2 else delays[len(delays) // 2],
            }
        )
    return records


def _first_conflict(looks: list[ConflictEstimate]) -> int | None:
    state = DecisionState()
    for i, estimate in enumerate(looks):
        state, verdict = step(state, estimate, EACH_LOOK)
        if verdict.status == "conflict":
            return i
    return None


def _looks_of_each_run(course: Course, runs: int, seed: int) -> Iterator[list[tuple[ConflictEstimate, Check]]]:
    generator = torch.Generator().manual_seed(seed)
    populations = {course.at(look): with_cosine(course.at(look), 8) for look in range(course.looks)}
    looks: list[list[tuple[ConflictEstimate, Check]]] = [[] for _ in range(runs)]
    recent: list[Moments] = []
    for look in range(course.looks):
        newest = guard(populations[course.at(look)].draw(runs, 64, 16, generator), 8)
        recent = [*recent, newest][-POOLED:]
        for run, look in enumerate(zip(_estimates(pool(recent), len(recent)), checks_of(newest), strict=True)):
            looks[run].append(look)
    yield from looks


def _estimates(moments: Moments, refreshes: int) -> Iterator[ConflictEstimate]:
    """At the threshold 0 the interval decides by the inner product alone."""
    error = moments.covariance[:, 0, 0].sqrt()
    rows = zip(moments.value.tolist(), error.tolist(), moments.degrees.tolist(), strict=True)
    for (inner, one, many), spread, degrees in rows:
        room = student_t_quantile(0.975, degrees) * spread
        known = one > 0 and many > 0
        status = "conflict" if inner + room < 0 else "clear" if inner - room > 0 else "undetermined"
        yield ConflictEstimate(
            k=8,
            status=status if known else "undetermined",
            reason="",
            confidence=0.95,
            threshold=0.0,
            num_prompts=64 * refreshes,
            num_informative=48 * refreshes,
            num_refreshes=refreshes,
            cosine=inner / (one * many) ** 0.5 if known else None,
        )
