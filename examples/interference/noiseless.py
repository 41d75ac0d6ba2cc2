"""The main setting without sampling noise: every arm on the exact expectation of its gradient, in seconds a run.

    python -m examples.interference.noiseless [--seeds 12 13 14 15] [--arms ...] [--report]

p(x) and its gradient are known here (exact.py), and so is the expected step of advantages that put the weight W_n(p)
on a prompt: mean_x W_n(p(x)) grad p(x), over the 32 prompts of the step. Projections get the exact gradient of pass@1
on 64 probe prompts, renewed every 5 steps. Learning rate, length and prompts are those of the benchmark, whose runs
through TRL take minutes and add the noise of 16 samples a prompt.

Runs what is not yet in `runs/noiseless.jsonl` and prints a table; `--results benchmarks/noiseless.jsonl --report` shows
the runs behind docs/rivals.md.

Left out: `reweight`, whose floor is solved from noisy estimates, and a soft projection, which is PCGrad without noise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.interference import comparison
from examples.interference.exact import evaluate, gradient_cosine, pass_at_k, success_probability
from examples.interference.task import make_prompts
from examples.interference.warm_start import warm_start
from passk_guard import named_weighting
from passk_guard.mitigation import projection_coefficient

STEPS, PROMPTS, SAMPLES, K, PROBE, EVERY = 180, 32, 16, 8, 64, 5
RATE = 0.015  # the benchmark's 0.075, of a loss that TRL divides by the length 5


@dataclass(frozen=True)
class Exact:
    """An arm in expectation.

    Attributes:
        label: for the table.
        weight: spec of `named_weighting`; {k} is replaced by k.
        scale: of the weight.
        k: step, k* -> the k of this step.
        gamma: of a projection; None for none.
        by_module: project each parameter tensor by itself.
        unsolved: train only on prompts without a success among 16 samples of the starting policy.
    """

    label: str
    weight: str = "passk:{k}"
    scale: float = 1.0
    k: Callable[[int, int], int] = lambda step, k_star: K
    gamma: float | None = None
    by_module: bool = False
    unsolved: bool = False


ARMS = {
    "none": Exact("pass@8"),
    "pass_at_1": Exact("pass@1 (RLOO)", "rloo"),
    "grpo": Exact("GRPO", "grpo"),
    "maxrl": Exact("MaxRL", "maxrl"),
    "maxrl_slow": Exact("MaxRL at 8/15 of the rate", "maxrl", K / (SAMPLES - 1)),  # the largest weight is then pass@8's
    "verl": Exact("verl's grpo_passk, times n (pass@16)", "verl_grpo_passk", SAMPLES),
    "hard_only": Exact("pass@1 on unsolved prompts", "rloo", unsolved=True),
    "anneal": Exact("k annealed from 8 to 1", k=lambda step, k_star: 1 + round((K - 1) * (1 - step / (STEPS - 1)))),
    "k_star": Exact("k = exact k*", k=lambda step, k_star: k_star),
    "floor": Exact("pass@8, floor 0.5", "passk:{k},floor=0.5"),
    "mixture": Exact("0.3 J_1 + 0.7 J_8", "mixture:k={k},share=0.3"),
    "recipe": Exact("1.0 J_1 + 0.2 J_8", "mixture:k={k},share=0.8333333333333334", 1.2),
    "project": Exact("project, gamma 0.2", gamma=0.2),
    "pcgrad": Exact("PCGrad (gamma 0)", gamma=0.0),
    "per_module": Exact("PCGrad in each module", gamma=0.0, by_module=True),
}


def run(name: str, seed: int, cache: Path, steps: int = STEPS) -> comparison.Record:
    """One run; the record has the form of the benchmark's."""
    torch.set_num_threads(1)
    arm, began = ARMS[name], time.monotonic()
    folder = warm_start(cache, seed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    parameters = list(model.parameters())
    rows, test = make_prompts("train", steps * PROMPTS, seed), make_prompts("test", 768, seed=0)
    if arm.unsolved:
        with torch.no_grad():
            p = success_probability(model, tokenizer, rows).double().clamp(0, 1)
        drawn = torch.binomial(torch.full_like(p, SAMPLES), p, generator=torch.Generator().manual_seed(seed))
        kept = [row for row, count in zip(rows, drawn.tolist(), strict=True) if count == 0]
        rows = kept * (steps * PROMPTS // len(kept) + 1)
    needs_probe = arm.gamma is not None or name == "k_star"
    probes = make_prompts("probe", -(-steps // EVERY) * PROBE, seed) if needs_probe else []
    trajectory, protected, k_star = [], None, K
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            rates = evaluate(model, tokenizer, test, K)
            trajectory.append({"step": step} | {n: float(f"{rates[n]:.5g}") for n in ("pass_at_1", f"pass_at_{K}")})
        if step == steps:
            break
        if needs_probe and step % EVERY == 0:
            probe = probes[step // EVERY * PROBE :][:PROBE]
            if arm.gamma is not None:
                protected = _gradient(pass_at_k(success_probability(model, tokenizer, probe), 1), parameters)
            else:
                cosines = gradient_cosine(model, tokenizer, probe, range(2, K + 1))
                k_star = next((k - 1 for k, cosine in cosines.items() if cosine < 0), K)
        p = success_probability(model, tokenizer, rows[step * PROMPTS :][:PROMPTS])
        weighting = named_weighting(arm.weight.format(k=arm.k(step, k_star)))
        weight = arm.scale * weighting.effective_weight(p.detach().clamp(0, 1), SAMPLES).float()
        ascent = _gradient((weight * p).mean(), parameters)
        if protected is not None:
            _project(ascent, protected, arm)
        with torch.no_grad():
            for parameter, direction in zip(parameters, ascent, strict=True):
                parameter.add_(direction, alpha=RATE)
    seconds = round(time.monotonic() - began, 1)
    return {"setting": "main", "arm": name, "seed": seed, "steps": steps, "k": K, "seconds": seconds} | {
        "trajectory": trajectory
    }


def _gradient(value: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.autograd.grad(value, parameters))


def _project(ascent: list[Tensor], protected: list[Tensor], arm: Exact) -> None:
    """g <- g + c p in place, for all parameters together or for each one by itself."""
    pairs = [((g, p), (g, g), (p, p)) for g, p in zip(ascent, protected, strict=True)]
    inner = torch.tensor([[float((a.double() * b.double()).sum()) for a, b in three] for three in pairs])
    inner = inner if arm.by_module else inner.sum(0).expand_as(inner)
    for g, p, (gp, gg, pp) in zip(ascent, protected, inner.tolist(), strict=True):
        g.add_(p, alpha=projection_coefficient(gp, gg, pp, arm.gamma))


def table(records: list[comparison.Record], sampled: list[comparison.Record]) -> list[str]:
    """Means over seeds, as lines of Markdown; the last two columns are the benchmark's runs of the same seeds.

    `lowest` is pass@1 at any evaluation, against the start.
    """
    headings = ("arm", "seeds", "change of pass@1", "lowest", "change of pass@8", "gain kept", "through TRL: @1", "@8")
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name, arm in ARMS.items():
        if runs := comparison.runs_of(records, "main", name):
            seeds = {run["seed"] for run in runs}
            twins = [run for run in comparison.runs_of(sampled, "main", name) if run["seed"] in seeds]
            share = comparison.kept(records, "main", name)
            kept = "-" if share is None else f"{share:.0%}"
            numbers = [*_changes(runs), *(_changes(twins) if len(twins) == len(runs) else ("-", "-"))]
            numbers[1:1] = [f"{comparison.lowest(runs, EVERY) or 0.0:+.3f}"]
            lines.append(f"| {arm.label} | {len(runs)} | {' | '.join([*numbers[:3], kept, *numbers[3:]])} |")
    return lines


def _changes(runs: list[comparison.Record]) -> tuple[str, ...]:
    return tuple(f"{comparison.change(runs, name).mean:+.3f}" for name in ("pass_at_1", f"pass_at_{K}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[12, 13, 14, 15])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--results", type=Path, default=Path("runs/noiseless.jsonl"))
    parser.add_argument("--cache", type=Path, default=Path("runs/warm_start"), help="where warm starts are kept")
    parser.add_argument("--sampled", type=Path, default=Path("benchmarks/interference.jsonl"), help="runs through TRL")
    parser.add_argument("--report", action="store_true", help="run nothing, show what is there")
    given = parser.parse_args()
    done = {(r["arm"], r["seed"]) for r in comparison.read(given.results)}
    todo = [(a, s) for s in given.seeds for a in given.arms if (a, s) not in done and not given.report]
    for arm, seed in tqdm(todo, desc="runs", file=sys.stderr, disable=None):
        given.results.parent.mkdir(parents=True, exist_ok=True)
        comparison.append(given.results, run(arm, seed, given.cache))
    print("\n".join(table(comparison.read(given.results), comparison.read(given.sampled))))


if __name__ == "__main__":
    main()
