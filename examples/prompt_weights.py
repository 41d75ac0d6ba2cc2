"""What an objective does to prompts: the weight that it puts on the gradient of a prompt's pass rate p.

    python -m examples.prompt_weights [grpo maxrl passk:8 ...] [--num-samples 16]

prints W_n(p), exact for groups of n samples, of each objective that `named_weighting` knows. It says how an objective
shares its step out among easy and hard prompts; a common factor is one of the learning rate. For a trainer of your own
pass its advantages to `passk_guard.passk.tabulated`, as `clipped` here.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from passk_guard import named_weighting
from passk_guard.passk import tabulated

RATES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
SPECS = (
    "rloo",
    "grpo",
    "maxrl",
    "rs_grpo:beta=2",
    "passk:8",
    "passk:8,floor=0.5",
    "mixture:k=8,share=0.3",
    "mixture:k=8,share=0.8333333333333334",
    "passk_training:8",
    "verl_grpo_passk",
)


def clipped(rewards: Tensor) -> Tensor:
    """Advantages [n] of one group of a trainer that clips GRPO's at 2."""
    return ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).clamp(-2, 2)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=SPECS)
    parser.add_argument("--num-samples", type=int, default=16)
    given = parser.parse_args(arguments)
    n = given.num_samples
    print("| objective |", " | ".join(f"p={p:g}" for p in RATES), "|")
    print("|---" * (len(RATES) + 1) + "|")
    for weighting in (*map(named_weighting, given.specs), tabulated(clipped, n, "grpo, clipped at 2")):
        weights = weighting.effective_weight(torch.tensor(RATES, dtype=torch.float64), n).tolist()
        print(f"| {weighting.name} |", " | ".join(f"{w:.2f}" for w in weights), "|")


if __name__ == "__main__":
    main()
