"""The share of J_1 for the benchmark's fixed mixture, chosen on a seed that is not reported.

    python -m examples.interference.choose_mixture [--shares 0.1 0.3 0.5 0.7] [--seed 100] [--report]

Runs the main setting unguarded and once for each share, two side by side, adding what is not yet there to
`runs/benchmark/mixture.jsonl`, and prints what each bought. Taken is the share with the largest sum of the changes of
pass@1 and of pass@8.
`--results benchmarks/mixture.jsonl --report` shows the runs behind the 0.3 in `arms.py`.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.interference import comparison
from examples.interference.arms import ARMS, mixed
from examples.interference.benchmark_run import run


def run_missing(shares: list[float], seed: int, results: Path, cache: Path) -> None:
    """Run what is not in the file yet, appending each run as it ends."""
    arms = [ARMS["none"], *(mixed(share) for share in shares)]
    done = {(record["arm"], record["seed"]) for record in comparison.read(results)}
    todo = [arm for arm in arms if (arm.label, seed) not in done]
    results.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(run, "main", arm, seed, cache) for arm in todo]):
            comparison.append(results, future.result())


def chosen(records: list[comparison.Record], shares: list[float]) -> float | None:
    """The share with the largest sum of both changes; None where none was run."""
    sums = {}
    for share in shares:
        if runs := comparison.runs_of(records, "main", mixed(share).label):
            sums[share] = sum(comparison.change(runs, name).mean for name in ("pass_at_1", "pass_at_8"))
    return max(sums, key=lambda share: sums[share], default=None)


def print_table(console: Console, records: list[comparison.Record], shares: list[float]) -> None:
    table = Table(title="fixed mixtures, main setting")
    for heading in ("arm", "change of pass@1", "change of pass@8", "gain kept"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for label in (ARMS["none"].label, *(mixed(share).label for share in shares)):
        if runs := comparison.runs_of(records, "main", label):
            one, many = (comparison.change(runs, name).mean for name in ("pass_at_1", "pass_at_8"))
            share = comparison.kept(records, "main", label, ARMS["none"].label)
            table.add_row(label, f"{one:+.3f}", f"{many:+.3f}", "-" if share is None else f"{share:.0%}")
    console.print(table)
    console.print(f"share of J_1 with the largest sum of changes: {chosen(records, shares)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.3, 0.5, 0.7])
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--results", type=Path, default=Path("runs/benchmark/mixture.jsonl"))
    parser.add_argument("--cache", type=Path, default=Path("runs/warm_start"), help="where warm starts are kept")
    parser.add_argument("--report", action="store_true", help="run nothing, show what is there")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not given.report:
        run_missing(given.shares, given.seed, given.results, given.cache)
    print_table(Console(), comparison.read(given.results), given.shares)


if __name__ == "__main__":
    main()
