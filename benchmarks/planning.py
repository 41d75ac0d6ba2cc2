"""Does `passk-guard plan` say what then happens? Predicted beside achieved, where the cosine is known.

    python -m benchmarks.planning [--quick] [--only power looks spread real cost]

`power`: chance that one estimate (1 and 3 refreshes pooled) establishes the conflict. `looks`: refreshes within which
the evidence of the run calls it with 90% power, and the share of runs in which it has by then. `spread`: the same
plan from 12 refreshes of 64 prompts, as a run has them, measured without a conflict for one of -0.2: its median, and
how often its range holds what a plan from 400 refreshes says. `real`: power and looks where the score vectors are
those of the demo's model before steps 0 and 60 of its run (`benchmarks.calibration`), at the cosine they have. `cost`:
seconds of a refresh against prompts, in the demo's GRPO run. The last two need its warm start; the others take minutes
of one core, seconds with `--quick`.

Noise for the first two is measured at 64 prompts: "at c" in the population itself, "at 0" in one whose cosine is 0, as
in a run that plans ahead of a conflict, "at -0.8" in a stronger conflict, which is noisier. The claim is for
power: within 0.1 "at c", within 0.15 "at 0" down to -0.2; for looks, of both: at least 0.8 of the runs are called by
then. Exits with 1 where it does not hold; `real` is shown without a claim.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.calibration_populations import Population, with_cosine
from benchmarks.calibration_statistics import Draw, checks_of, guard, pool
from benchmarks.growth import slope
from passk_guard import GuardConfig, ProbeGram
from passk_guard.estimation.evidence import RunEvidence
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.estimation.power import (
    Noise,
    average_noise,
    look_of,
    looks_until_called,
    measure_noise,
    power_of_one,
    signal_of,
)
from passk_guard.estimation.ustatistics import Moments
from passk_guard.estimation.verdict import DecisionRule
from passk_guard.planning import make_plan

K, SAMPLES, MEASURED_ON = 8, 16, 64
COSINES = (-0.1, -0.2, -0.3, -0.5)
PROMPTS = (32, 64, 128, 256)
POWER = 0.9
RULE = DecisionRule(false_alarms=0.05)
TOLERANCE, TOLERANCE_AHEAD = 0.1, 0.15
FAR = -0.2
"""Down to here noise that was measured at a cosine of 0 is claimed to do."""


def probes_of(draw: Draw) -> Iterator[ProbeGram]:
    """Each repetition of a draw as the refresh that the product would see."""
    positive, negative, correct = draw.positive.sum(0), draw.negative.sum(0), draw.correct.sum(0)
    for i in range(len(correct)):
        sums = torch.cat([positive[i], negative[i]])
        yield ProbeGram(sums @ sums.T, torch.full_like(correct[i], 2 * draw.half), correct[i])


def measured(population: Population, refreshes: int, generator: torch.Generator) -> Noise:
    """What the product would have written down after so many refreshes."""
    found = list[Noise | None]()
    for size in pieces(refreshes, MEASURED_ON):
        draw = population.draw(size, MEASURED_ON, SAMPLES, generator)
        found += [measure_noise(probe, K) for probe in probes_of(draw)]
    return average_noise([noise for noise in found if noise is not None])


def looked(population: Population, m: int, refreshes: int, runs: int, generator: torch.Generator) -> Iterator[Moments]:
    """Estimates of so many pooled refreshes, some runs at a time."""
    for size in pieces(runs, m):
        yield pool([guard(population.draw(size, m, SAMPLES, generator), K) for _ in range(refreshes)])


def pieces(runs: int, m: int) -> list[int]:
    """How many refreshes of m prompts are held at a time: score vectors of 512 numbers take 64 MiB a kind."""
    most = max(1, (1 << 14) // m)
    return [min(most, runs - first) for first in range(0, runs, most)]


def studentised(moments: Moments) -> list[float]:
    return (moments.value[:, 0] / moments.covariance[:, 0, 0].sqrt()).tolist()


def achieved_power(population: Population, m: int, refreshes: int, runs: int, generator: torch.Generator) -> float:
    """Share of pooled estimates that establish the conflict at 95%, one-sided."""
    called = 0
    for moments in looked(population, m, refreshes, runs, generator):
        known = (moments.value[:, 1:] > 0).all(1).tolist()
        rows = zip(studentised(moments), moments.degrees.tolist(), known, strict=True)
        called += sum(ok and t < -student_t_quantile(0.975, degrees) for t, degrees, ok in rows)
    return called / runs


def called_by(population: Population, m: int, looks: int, runs: int, generator: torch.Generator) -> float:
    """Share of runs whose evidence has called a conflict at or before this look."""
    evidence, called = [RunEvidence()] * runs, [False] * runs
    for _ in range(looks):
        found = [check for moments in looked(population, m, 1, runs, generator) for check in checks_of(moments)]
        evidence = [e.with_check(check) for e, check in zip(evidence, found, strict=True)]
        called = [c or e.p_value <= 0.05 for c, e in zip(called, evidence, strict=True)]
    return sum(called) / runs


def predicted(noise: Noise, cosine: float, m: int) -> tuple[dict[int, float], int | None]:
    """Power of 1 and of 3 pooled refreshes, and the looks of a run."""
    size = signal_of(noise, 0.95).size
    assert size is not None
    look = look_of(noise, size, cosine, m)
    return {r: power_of_one(look, r, 0.95) for r in (1, 3)}, looks_until_called(look, RULE, POWER)


def power_table(cosines: tuple[float, ...], prompts: tuple[int, ...], runs: int, seed: int = 0) -> list[str]:
    """Prints the table; what the plan missed."""
    generator, missed = torch.Generator().manual_seed(seed), []
    ahead = measured(with_cosine(0.0, K), 400, generator)
    print("| cosine | prompts | pooled | noise at c | noise at 0 | achieved |\n|---|---|---|---|---|---|")
    for cosine in cosines:
        population = with_cosine(cosine, K)
        there = measured(population, 400, generator)
        for m in prompts:
            at_c, at_0 = predicted(there, cosine, m)[0], predicted(ahead, cosine, m)[0]
            for refreshes in (1, 3):
                got = achieved_power(population, m, refreshes, runs, generator)
                print(f"| {cosine} | {m} | {refreshes} | {at_c[refreshes]:.2f} | {at_0[refreshes]:.2f} | {got:.2f} |")
                ahead_of_it = cosine >= FAR and abs(at_0[refreshes] - got) > TOLERANCE_AHEAD
                if abs(at_c[refreshes] - got) > TOLERANCE or ahead_of_it:
                    missed.append(f"power at {cosine}, {m} prompts, {refreshes} pooled")
    return missed


def looks_table(cosines: tuple[float, ...], prompts: tuple[int, ...], runs: int, seed: int = 1) -> list[str]:
    """Prints the table; what the plan missed. Plans of more than 40 looks are left out."""
    generator, missed = torch.Generator().manual_seed(seed), []
    ahead = measured(with_cosine(0.0, K), 400, generator)
    strong = measured(with_cosine(-0.8, K), 400, generator)
    print("| cosine | prompts | looks, noise at c | called by then | at 0 | called by then | at -0.8 |")
    print("|---|---|---|---|---|---|---|")
    for cosine in cosines:
        population = with_cosine(cosine, K)
        there = measured(population, 400, generator)
        for m in prompts:
            looks = [predicted(noise, cosine, m)[1] for noise in (there, ahead)]
            if any(count is None or count > 40 for count in looks):
                continue
            far = predicted(strong, cosine, m)[1] or "> 200"
            got = [called_by(population, m, count or 0, runs, generator) for count in looks]
            print(f"| {cosine} | {m} | {looks[0]} | {got[0]:.2f} | {looks[1]} | {got[1]:.2f} | {far} |")
            if got[0] < POWER - TOLERANCE or (cosine >= FAR and got[1] < POWER - TOLERANCE):
                missed.append(f"looks at {cosine}, {m} prompts")
    return missed


def spread_table(plans: int, refreshes: int = 12, cosine: float = -0.2, seed: int = 2) -> list[str]:
    """Prints the table; never misses: a range of one standard error is what it is."""
    generator, config = torch.Generator().manual_seed(seed), GuardConfig()
    quiet = with_cosine(0.0, K)
    exact = make_plan(measured(quiet, 400, generator), config, cosine=cosine, prompts=PROMPTS).options
    made = [
        make_plan(measured(quiet, refreshes, generator), config, cosine=cosine, prompts=PROMPTS) for _ in range(plans)
    ]
    numbers = [plan for plan in made if plan.signal.size is not None]
    print(f"{len(numbers)} of {plans} plans give numbers, the others say that the probe holds no signal.\n")
    print("| prompts | refreshes, from 400 | median of the plans | 10% to 90% of them | range holds it |")
    print("|---|---|---|---|---|")
    for i, truth in enumerate(exact):
        many = 10**6
        found = sorted(many if p.options[i].refreshes is None else p.options[i].refreshes for p in numbers)
        held = statistics.mean(
            (p.options[i].fewest or many) <= (truth.refreshes or many) <= (p.options[i].most or many) for p in numbers
        )
        shown = [found[int(share * (len(found) - 1))] for share in (0.5, 0.1, 0.9)]
        median, low, high = ("> 200" if count == many else str(count) for count in shown)
        print(f"| {truth.prompts} | {truth.refreshes or '> 200'} | {median} | {low} to {high} | {held:.2f} |")
    return []


def real_table(cache: Path, prompts: tuple[int, ...], runs: int, seed: int = 3) -> list[str]:
    """Prints the table; claims nothing. Plans of more than 40 looks are left out."""
    from benchmarks.calibration_real import pools

    generator = torch.Generator().manual_seed(seed)
    print("| step | cosine | prompts | power of 1, plan | achieved | of 3, plan | achieved | looks | called by then |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, population in pools(cache, 0, (0, 60)).items():
        noise, cosine = measured(population, 200, generator), population.cosine(K)
        for m in prompts:
            power, looks = predicted(noise, cosine, m)
            got = {r: achieved_power(population, m, r, runs, generator) for r in power}
            shown = " | ".join(f"{power[r]:.2f} | {got[r]:.2f}" for r in power)
            by_then = "-"
            if looks is not None and looks <= 40:
                by_then = f"{called_by(population, m, looks, min(runs, 100), generator):.2f}"
            print(f"| {name} | {cosine:.2f} | {m} | {shown} | {looks or '> 200'} | {by_then} |", flush=True)
    return []


def cost_table(cache: Path) -> list[str]:
    """Prints the table; the exponent of the time of a refresh against its prompts."""
    from transformers import PrinterCallback

    from examples.interference.task import correct, make_prompts
    from examples.interference.train import build_trainer
    from examples.interference.warm_start import warm_start
    from passk_guard import PassKGuardCallback

    model_dir, seconds = warm_start(cache, 0), []
    for m in PROMPTS:
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(model_dir, folder, steps=5, report_to=[], learning_rate=0.0, disable_tqdm=True)
            trainer.remove_callback(PrinterCallback)
            config = GuardConfig(k=K, probe_prompts=m, refresh_steps=1)
            probe = make_prompts("probe", 2048, seed=0)
            trainer.add_callback(PassKGuardCallback(trainer, probe=probe, correct=correct, config=config))
            trainer.train()
            spent = [row["passk_guard/probe_seconds"] for row in trainer.state.log_history if "loss" in row]
        seconds.append(statistics.median(spent[1:]))
        print(f"{m} prompts: {seconds[-1]:.2f} s a refresh, {1000 * seconds[-1] / m:.1f} ms a prompt", flush=True)
    exponent, error = slope(PROMPTS, seconds)
    print(f"exponent {exponent:.2f} ± {error:.2f}")
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("power", "looks", "spread", "real", "cost"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path("runs/warm_start"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    cosines, prompts = (COSINES[1:3], PROMPTS[1:3]) if given.quick else (COSINES, PROMPTS)
    parts = {
        "power": lambda: power_table(cosines, prompts, 100 if given.quick else 500),
        "looks": lambda: looks_table(cosines, prompts, 50 if given.quick else 120),
        "spread": lambda: spread_table(10 if given.quick else 60),
        "real": lambda: real_table(given.cache, prompts, 100 if given.quick else 300),
        "cost": lambda: cost_table(given.cache),
    }
    missed = []
    for name in given.only or ("power", "looks", "spread"):
        print(f"\n{name}\n", flush=True)
        missed += parts[name]()
    for what in missed:
        print(f"The plan was wrong: {what}.", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
