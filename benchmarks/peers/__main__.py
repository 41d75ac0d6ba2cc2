"""Per-sample gradient sketches by this package and its peers: time, peak memory, accuracy and coverage on one batch.

    make bench-peers                                  # its own environment, .venv-peers
    python -m benchmarks.peers [--repeats 3] [--only opacus]

Every method runs in a process of its own, on one thread, in turn with plain steps. "time" is processor time of one run
over that of one plain forward and backward, medians; "memory" what setting up and one run added to the peak of the
process over what the same model and batch hold, in MiB; k_eff = 1/(mean squared error of pairwise cosines against
gradients from one backward pass a sample), over two seeds where there are projections; "its own" the same against
exact gradients of what the method sees; "coverage" the share of the trainable parameters whose gradients enter, a tied
one counted once for each use. A method that fails has the error in its row.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.peak import peak_added
from benchmarks.peers.methods import METHODS, Method, plain_training
from benchmarks.peers.problem import Problem, load, prepare
from benchmarks.sketch_speed import measure

EXACT = 1e-10  # mean squared error of cosines below which nothing but rounding is left
SEEDS = 2


def squared_errors(method: Method, problem: Problem) -> tuple[float, float]:
    """Of the pairwise cosines: against gradients of everything, and of what the method sees."""
    assert method.cosines is not None
    found = method.cosines(method.run())
    own = problem.exact if method.sees == set(problem.sizes) else problem.exact_linear
    return float((found - problem.exact).square().mean()), float((found - own).square().mean())


def report(name: str, path: Path, repeats: int) -> dict[str, Any]:
    """All numbers of one method."""
    problem = load(path)
    set_up, _, _ = METHODS[name]
    sizes = problem.sizes
    made: list[Method] = []

    def first() -> None:
        made.append(set_up(problem, 0))
        made[0].run()

    memory = peak_added(first)
    method = made[0]
    runs = {"plain": plain_training(load(path), 0).run, "method": method.run}  # peers leave hooks on their model
    if name == "plain forward+backward":
        del runs["method"]
    seconds = measure(runs, repeats, "cpu")
    row: dict[str, Any] = {
        "time": seconds.get("method", seconds["plain"]) / seconds["plain"],
        "seconds": seconds["plain"],
        "memory": memory / 2**20,
        "numbers": method.numbers,
        "coverage": sum(sizes[n] for n in method.sees) / sum(sizes.values()),
    }
    if method.cosines is not None:
        errors = [squared_errors(method, problem)]
        if errors[0][0] > EXACT and "autogram" not in name:  # a projection, or something is missing
            errors += [squared_errors(set_up(load(path), seed), problem) for seed in range(1, SEEDS)]
        row["error"], row["own_error"] = (statistics.mean(column) for column in zip(*errors, strict=True))
    return row


def in_a_process(name: str, path: Path, repeats: int) -> dict[str, Any]:
    """The row of a method, or {"failed": why}."""
    command = [sys.executable, "-m", "benchmarks.peers", "--method", name, "--problem", str(path)]
    command += ["--repeats", str(repeats)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return {"failed": "took more than 15 minutes"}
    if done.returncode == 0:
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return {"failed": next((line for line in reversed(lines) if "Error" in line), lines[-1])[:200]}


def version(distribution: str | None) -> str:
    if distribution is None:
        return ""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def k_eff(error: float) -> str:
    return "exact" if error < EXACT else f"{1 / error:,.0f}"


def markdown(name: str, row: dict[str, Any]) -> str:
    _, distribution, remark = METHODS[name]
    if "failed" in row:
        return f"| {name} | {version(distribution)} | | | | | | | {row['failed']} |"
    accuracy = f"{k_eff(row['error'])} | {k_eff(row['own_error'])}" if "error" in row else " | "
    numbers = f"{row['numbers']:,}" if row["numbers"] else ""
    return (
        f"| {name} | {version(distribution)} | {row['time']:.2f} | {row['memory']:.0f} | {numbers} | {accuracy} "
        f"| {100 * row['coverage']:.0f}% | {remark} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="methods whose names hold one of these, beside plain steps")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--problem", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.method:
        print(json.dumps(report(given.method, given.problem, given.repeats)))
        return
    wanted = [n for n in METHODS if not given.only or any(part.lower() in n.lower() for part in given.only)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.pt"
        prepare(path)
        print(f"torch {torch.__version__}, transformers {version('transformers')}")
        print("| method | version | time | memory, MiB | numbers a sample | k_eff | its own | coverage | remark |")
        print("|---|---|---|---|---|---|---|---|---|")
        for name in wanted:
            print(markdown(name, in_a_process(name, path, given.repeats)), flush=True)


if __name__ == "__main__":
    main()
