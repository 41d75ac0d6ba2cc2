"""Is the estimate calibrated where the completions are those of an earlier policy?

    python -m benchmarks.calibration_reuse [--only draws runs inner] [--repetitions 400] [--report]

Prompts with 32 possible answers each, log-linear policies exp(phi . theta): the population of 600 prompts, so that the
cosine of the present policy is exact (64 prompts x 16, k = 8). Every cell is about the same present policy, and so the
same truth.

draws: one draw, of a policy displaced by `shift` times a random direction, by how far that is; "shift 0" is fresh.
runs: the policy moves by `step` between refreshes, `resample_refreshes` of them from one draw, three draws pooled. The
    `lag` is exact: the cosine of the pooled policies less that of the newest.
inner: bias of the inner product alone at a cosine of -0.4, fresh and reweighted, five times as often.

JSON lines are appended to `--results`; `--report` shows them instead, and `--results
benchmarks/calibration_reuse.jsonl --report` those that are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import calibration_reuse_runs as runs
from benchmarks.calibration_reuse_draws import DIM, NOW, Draw, K, cosine_of, with_cosine
from passk_guard.estimation.estimate import estimate_pooled
from passk_guard.estimation.ustatistics import coefficients, prompt_kernel

SHIFTS = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)


def measure(cosine: float, shift: float, repetitions: int, seed: int) -> dict[str, float]:
    """One draw."""
    population, generator = with_cosine(cosine), torch.Generator().manual_seed(seed)
    exact = population.products(NOW)
    inner, truth = float(exact[0]), cosine_of(exact)
    shares, errors, cosines, held, conflicts = [], [], [], [], 0
    for _ in range(repetitions):
        direction = torch.randn(DIM, generator=generator, dtype=torch.float64)
        drawn = Draw(population, NOW - shift * direction / direction.norm(), generator)
        probe, share = drawn.look(NOW, fresh=not shift)
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


def inner_bias(cosine: float, shift: float, repetitions: int, seed: int) -> dict[str, float]:
    """The inner product of one draw alone, without the interval, so that many repetitions are cheap."""
    population, generator = with_cosine(cosine), torch.Generator().manual_seed(seed)
    exact, found = float(population.products(NOW)[0]), []
    for _ in range(repetitions):
        direction = torch.randn(DIM, generator=generator, dtype=torch.float64)
        drawn = Draw(population, NOW - shift * direction / direction.norm(), generator)
        probe, _ = drawn.look(NOW, fresh=not shift)
        one, many = coefficients(probe, torch.tensor([1, K]))
        kernel = prompt_kernel(probe, one, many)
        found.append(float(kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1)))
    off = torch.tensor(found, dtype=torch.float64) - exact
    error = float(off.std()) / repetitions**0.5
    return {
        "cosine": cosine,
        "shift_of_inner": shift,
        "repetitions": repetitions,
        "inner": exact,
        "inner_bias": float(off.mean()),
        "inner_bias_error": error,
        "inner_bias_in_errors": round(float(off.mean()) / error, 2),
    }


def records(parts: Sequence[str], cosines: Sequence[float], repetitions: int, seed: int) -> Iterator[dict[str, float]]:
    for cosine in cosines if "draws" in parts else ():
        for i, shift in enumerate(SHIFTS):
            yield measure(cosine, shift, repetitions, seed + i)
    if "inner" in parts:
        for i, shift in enumerate((0.0, 0.3)):
            yield inner_bias(-0.4, shift, 5 * repetitions, seed + 100 + i)
    for cosine in cosines if "runs" in parts else ():
        for i, (step, refreshes) in enumerate(itertools.product(runs.STEPS, runs.REFRESHES)):
            yield runs.measure(cosine, refreshes, step, repetitions, seed + 200 + i)


def report(found: Sequence[dict[str, float]]) -> None:
    """A table for each kind of record."""
    for kind in ("shift", "step", "shift_of_inner"):
        rows = [record for record in found if kind in record]
        for i, record in enumerate(rows):
            if i == 0:
                print("\n| " + " | ".join(record) + " |\n|" + "---|" * len(record))
            print("| " + " | ".join(f"{value:.4g}" for value in record.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("draws", "runs", "inner")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--cosines", nargs="+", type=float, default=(0.0, -0.4))
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("runs/calibration_reuse.jsonl"))
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        report([json.loads(line) for line in given.results.read_text().splitlines()])
        return
    torch.set_num_threads(1)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    with given.results.open("a") as file:
        for record in records(given.only, given.cosines, given.repetitions, given.seed):
            print(json.dumps(record), file=file, flush=True)
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
