"""Whole runs of looks: how often a run without a conflict is called one, and how soon one is found, by each rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.calibration_populations import with_cosine
from benchmarks.calibration_statistics import guard, pool
from passk_guard.estimation.evidence import RunEvidence, score_of
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.estimation.records import ConflictEstimate
from passk_guard.estimation.ustatistics import Moments
from passk_guard.estimation.verdict import DecisionRule, DecisionState, decide

RULES = {
    "each look, patience 2": DecisionRule(patience=2, cooldown=3),
    "whole run": DecisionRule(patience=2, cooldown=3, false_alarms=0.05),
}
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
    Course("no conflict, 400 looks", 400, lambda look: 0.0, None),
    *(Course(f"cosine {c:g} from the start", 40, lambda look, c=c: c) for c in (-0.1, -0.2, -0.4, -0.8)),
    Course("-0.6, drifting to 0 over 20 looks", 40, lambda look: min(0.0, -0.6 + 0.03 * look)),
    Course("0.3 for 20 looks, then -0.4", 60, lambda look: 0.3 if look < 20 else -0.4, 20),
)


def measure(course: Course, runs: int, seed: int) -> list[dict[str, Any]]:
    """A record for each rule: share of runs that say CONFLICT (before it begins, and at all), and the median delay."""
    first: dict[str, list[int | None]] = {name: [] for name in RULES}
    for looks in _looks_of_each_run(course, runs, seed):
        for name, rule in RULES.items():
            first[name].append(_first_conflict(looks, rule))
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


def _first_conflict(looks: list[tuple[ConflictEstimate, float]], rule: DecisionRule) -> int | None:
    state, evidence = DecisionState(), RunEvidence()
    for i, (estimate, score) in enumerate(looks):
        state, evidence, verdict = decide(state, evidence, estimate, score, rule)
        if verdict.status == "conflict":
            return i
    return None


def _looks_of_each_run(course: Course, runs: int, seed: int) -> Iterator[list[tuple[ConflictEstimate, float]]]:
    generator = torch.Generator().manual_seed(seed)
    populations = {course.at(look): with_cosine(course.at(look), 8) for look in range(course.looks)}
    looks: list[list[tuple[ConflictEstimate, float]]] = [[] for _ in range(runs)]
    recent: list[Moments] = []
    for look in range(course.looks):
        newest = guard(populations[course.at(look)].draw(runs, 64, 16, generator), 8)
        recent = [*recent, newest][-POOLED:]
        scores = _scores(newest)
        for run, estimate in enumerate(_estimates(pool(recent), len(recent))):
            looks[run].append((estimate, scores[run]))
    yield from looks


def _scores(moments: Moments) -> list[float]:
    t = moments.value[:, 0] / moments.covariance[:, 0, 0].sqrt()
    return [score_of(x, d) for x, d in zip(t.tolist(), moments.degrees.tolist(), strict=True)]


def _estimates(moments: Moments, refreshes: int) -> Iterator[ConflictEstimate]:
    """At the threshold 0 the one-sided bounds decide by the inner product alone."""
    error = moments.covariance[:, 0, 0].sqrt()
    rows = zip(moments.value.tolist(), error.tolist(), moments.degrees.tolist(), strict=True)
    for (inner, one, many), spread, degrees in rows:
        room = student_t_quantile(0.95, degrees) * spread
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
