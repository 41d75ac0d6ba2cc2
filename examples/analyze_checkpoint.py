"""`analyze` on the demo's warm-started model, beside the exact angle: how good is the estimate?

    python -m examples.analyze_checkpoint [--prompts 128] [--samples 32] [--out runs/analysis]

On the interference task p(x) and its gradient are known exactly (examples/interference/exact.py), so the sampled
cosine can be held against the true one, on the very prompts that were sampled and on many more of their kind. Writes
`analysis.json` and `analysis.html`, and prints the two cosines over k.

What is estimated is the angle for prompts like these, so the interval is to hold the exact cosine of the many others;
that of the sampled prompts themselves counts each with itself too. Left out: several seeds. An interval at 95% misses
the truth once in twenty.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.interference.exact import gradient_cosine
from examples.interference.task import correct, make_prompts
from examples.interference.warm_start import warm_start
from passk_guard.analysis import Analysis, analyze
from passk_guard.analysis.words import print_analysis

KS = (1, 2, 3, 4, 8, 16)


def compare(
    cache: str | Path, out: str | Path, *, prompts: int, samples: int, seed: int = 0, progress: bool | None = None
) -> tuple[Analysis, dict[int, float], dict[int, float]]:
    """The analysis of `prompts` probe prompts, and the exact cosine on them and on 768 others of their kind."""
    model_dir = warm_start(cache, seed)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = make_prompts("probe", prompts, seed)
    analysis = analyze(
        model,
        tokenizer,
        rows,
        correct,
        ks=[k for k in KS if k <= samples],
        num_samples=samples,
        max_new_tokens=5,  # four digits and end-of-sequence
        batch_size=512,
        out=out,
        progress=progress,
        name=str(model_dir),
    )
    analysis.save(out)
    ks = analysis.settings["ks"][1:]
    there = gradient_cosine(model, tokenizer, rows, ks)
    elsewhere = gradient_cosine(model, tokenizer, make_prompts("test", 768, seed), ks)
    return analysis, there, elsewhere


def print_comparison(analysis: Analysis, there: dict[int, float], elsewhere: dict[int, float]) -> None:
    """One line a k: sampled with its interval, and the two exact ones."""
    print(f"{'k':>3} {'sampled':>8} {'95% interval':>16} {'exact, same prompts':>20} {'exact, 768 others':>18}")
    for at in analysis.at_k[1:]:
        cosine = at.cosine
        sampled, interval = "undetermined", ""
        if cosine.value is not None:
            sampled, interval = f"{cosine.value:+.2f}", f"[{cosine.low:+.2f}, {cosine.high:+.2f}]"
        print(f"{at.k:3} {sampled:>8} {interval:>16} {there[at.k]:>+20.2f} {elsewhere[at.k]:>+18.2f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("runs/warm_start"))
    parser.add_argument("--out", type=Path, default=Path("runs/analysis"))
    given = parser.parse_args(arguments)
    found = compare(given.cache, given.out, prompts=given.prompts, samples=given.samples, seed=given.seed)
    print_analysis(found[0])
    print_comparison(*found)
    print(f"Open {given.out / 'analysis.html'}")


if __name__ == "__main__":
    main()
