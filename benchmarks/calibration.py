"""Are the guard's numbers what they say? Bias, coverage, false alarms and power, where the truth is known.

    python -m benchmarks.calibration [--quick] [--only cells hard runs real] [--report]

`cells`: synthetic populations with a known cosine, the default probe and away from it in one direction at a time,
beside the plain average over all pairs, sample splitting, plug-in weights and the jackknife as it comes. `hard`: where
few prompts carry a gradient, where one is hardly there, and where prompts are paraphrases of one another. `real`: pools
of real per-completion gradients of the demo's model along an unguarded run. `runs`: whole runs of repeated looks, false
alarms and delay of the alert by each rule. Results are JSON lines, one a statistic and cell; the tables are made from
them, and `--results benchmarks/calibration.jsonl --report` shows those that are kept. What a file holds is not measured
again: to see a change of the code, give another file to `--results`. 15 minutes of one core, 1 with `--quick`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache as once
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import calibration_runs
from benchmarks.calibration_cells import Cell, hard_cells, measure, pool_cells, synthetic_cells
from benchmarks.calibration_file import Measurement, Record, read, take_missing
from benchmarks.calibration_populations import Population

PARTS = ("cells", "hard", "runs", "real")
POOL_STEPS = (0, 20, 60)


def plan(part: str, quick: bool, cache: Path, seed: int) -> Iterator[Measurement]:
    """The measurements of one part."""
    asked: Record = {"part": part, "seed": seed}
    if part == "cells":
        repetitions = 200 if quick else 1000
        for i, cell in enumerate([Cell(), Cell(cosine=0.0, refreshes=1)] if quick else synthetic_cells()):
            take = partial(measure, cell, cell.population(), repetitions, seed + i)
            yield Measurement(asked | _known(cell) | {"repetitions": repetitions}, take)
    elif part == "hard":
        repetitions = 100 if quick else 500
        for i, cell in enumerate(list(hard_cells())[:2] if quick else hard_cells()):
            take = partial(measure, cell, cell.population(), repetitions, seed + i, ("guard",))
            yield Measurement(asked | asdict(cell) | {"repetitions": repetitions}, take)
    elif part == "runs":
        runs = 50 if quick else 400
        courses = calibration_runs.COURSES[::2] if quick else calibration_runs.COURSES
        for i, course in enumerate([c for c in courses if not quick or c.looks <= 60]):
            take = partial(calibration_runs.measure, course, runs, seed + i)
            yield Measurement(asked | {"course": course.name, "runs": runs}, take)
        runs, lengths = (200, (40,)) if quick else (1000, (40, 400))
        for i, quiet in enumerate(calibration_runs.QUIET[:2] if quick else calibration_runs.QUIET):
            take = partial(calibration_runs.measure_quiet, quiet, runs, lengths, seed + i)
            yield Measurement(asked | {"course": quiet.name, "runs": runs}, take)
        for i, few in enumerate(calibration_runs.FEW_GAIN[:1] if quick else calibration_runs.FEW_GAIN):
            take = partial(calibration_runs.measure_few_gain, few, runs, 40, seed + i)
            yield Measurement(asked | {"course": few.name, "runs": runs}, take)
        runs = 20 if quick else 100
        for i, recurring in enumerate(calibration_runs.RECURRING[:1] if quick else calibration_runs.RECURRING):
            take = partial(calibration_runs.measure_recurring, recurring, runs, 40, seed + i)
            yield Measurement(asked | {"course": recurring.name, "runs": runs}, take)
    else:
        repetitions = 100 if quick else 500
        for step in POOL_STEPS[:1] if quick else POOL_STEPS:
            for i, cell in enumerate(pool_cells(f"step {step}")):
                if not quick or i == 1:
                    known = {name: value for name, value in _known(cell).items() if name != "cosine"}
                    take = partial(_measure_real, cell, repetitions, seed + i, cache, seed, quick)
                    yield Measurement(asked | known | {"repetitions": repetitions}, take)


def _known(cell: Cell) -> Record:
    """What the records of cells without clusters say of theirs: of the default spread, they do not name it."""
    return {name: value for name, value in asdict(cell).items() if name not in ("spread", "cluster", "named")}


def _measure_real(cell: Cell, repetitions: int, seed: int, cache: Path, pool_seed: int, quick: bool) -> list[Record]:
    population = _pools(cache, pool_seed, POOL_STEPS[:1] if quick else POOL_STEPS)[cell.source]
    return measure(cell, population, repetitions, seed, ("guard", "naive"))


@once
def _pools(cache: Path, seed: int, steps: tuple[int, ...]) -> dict[str, Population]:
    """Found when the first of their cells is missing: they take a training run."""
    from benchmarks.calibration_real import pools

    return dict(pools(cache, seed, steps))


def print_tables(console: Console, records: list[Record]) -> None:
    """A table for each part."""
    for part, title in (
        ("cells", "synthetic populations"),
        ("hard", "few prompts, faint gradients, clusters"),
        ("real", "real gradients"),
    ):
        rows = [r for r in records if r["part"] == part]
        if rows:
            console.print(_cells(f"{title}; 95% intervals", rows))
    if rows := [r for r in records if r["part"] == "runs"]:
        console.print(_runs(rows))


def _cells(title: str, rows: list[Record]) -> Table:
    table = Table(title=title)
    for name in ("source", "cosine", "m", "n", "k", "refreshes", "noise", "spread", "in fours", "sketch", "statistic"):
        table.add_column(name)
    for name in ("determined", "bias", "rmse", "covered 90%", "covered 95%", "missed", "conflict", "below truth"):
        table.add_column(name, justify="right")
    for r in rows:
        table.add_row(
            r["source"],
            f"{r['cosine']:+.2f}",
            *(str(r[name]) for name in ("m", "n", "k", "refreshes", "noise")),
            f"{r.get('spread', 0.3):g}",
            "-" if r.get("cluster", 1) == 1 else "named" if r["named"] else "not named",
            "-" if r["sketch_dim"] is None else str(r["sketch_dim"]),
            r["statistic"],
            f"{r['determined']:.2f}",
            *("-" if name not in r else f"{r[name]:+.3f}" for name in ("bias",)),
            *("-" if name not in r else f"{r[name]:.3f}" for name in ("rmse", "covered_90", "covered_95", "missed")),
            f"{r['conflict']:.3f}",
            f"{r['below_truth']:.3f}" if "below_truth" in r else "-",
        )
    return table


def _runs(rows: list[Record]) -> Table:
    table = Table(title="whole runs at the default probe, alerts at 5%")
    for name in ("course of the cosine", "rule"):
        table.add_column(name)
    for name in ("runs", "false alarms", "found", "median delay, looks"):
        table.add_column(name, justify="right")
    for r in rows:
        found = "-" if r["found"] is None else f"{r['found']:.2f}"
        delay = "-" if r["median_delay"] is None else str(r["median_delay"])
        table.add_row(r["course"], r["rule"], str(r["runs"]), f"{r['false_alarms']:.3f}", found, delay)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--results", type=Path, default=Path("runs/calibration.jsonl"))
    parser.add_argument("--cache", type=Path, default=Path("runs/warm_start"), help="where warm starts are kept")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.report:
        measurements = [m for part in given.only for m in plan(part, given.quick, given.cache, given.seed)]
        taken = take_missing(measurements, given.results)
        print(f"{taken} of {len(measurements)} cells measured; {given.results} held the others.")
    print_tables(Console(width=160), read(given.results))


if __name__ == "__main__":
    main()
