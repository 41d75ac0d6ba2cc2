"""Four tasks of reasoning-gym with short answers, split into disjoint prompts, scored by reasoning-gym itself.

A dataset of reasoning-gym is a stream: example i of seed s is drawn with seed s + i, so neighbouring seeds overlap and
small problems come again and again. The splits are therefore made of the prompt's text, and of nothing else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import reasoning_gym

from passk_guard.probe.prompts import prompt_key

Row = dict[str, str]


@dataclass(frozen=True)
class Kind:
    """The difficulty of a dataset of reasoning-gym.

    Attributes:
        settings: those that differ from its defaults.
        wording: what is the same in all of its prompts. The tokenizer makes each of these texts one token.
    """

    settings: dict[str, int]
    wording: tuple[str, ...]


# name in reasoning-gym -> difficulty
KINDS = {
    "spell_backward": Kind(
        {"min_word_len": 3, "max_word_len": 5},
        ("Spell this word backward (example: sun -> nus): ",),
    ),
    "chain_sum": Kind(
        {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        ("State the final answer to the following arithmetic problem: ", " ="),
    ),
    "gcd": Kind(
        {"max_value": 100},
        ("Find the Greatest Common Divisor (GCD) of these numbers: ", ". Give only the GCD as your final answer."),
    ),
    "count_bits": Kind(
        {"max_n": 4095},
        ("How many 1 bits are there in the binary representation of the number ", "?"),
    ),
}

# Of ten hash buckets. The warm start has prompts of its own: GRPO begins with prompts that were not memorised.
SPLITS = {"warm": range(5), "train": range(5, 8), "probe": range(8, 9), "test": range(9, 10)}

DRAWS = 30_000  # of each kind; what is left of them are 3700 (count_bits) to 20000 distinct prompts


@cache
def distinct_rows(kind: str, seed: int) -> dict[str, tuple[Row, ...]]:
    """The distinct prompts among `DRAWS` draws, by split.

    `prompt_key` also takes prompts for the same that differ in case only, as the guard's own check does.
    """
    spec = KINDS[kind]
    stream = reasoning_gym.create_dataset(kind, size=DRAWS, seed=seed * DRAWS, **spec.settings)
    found: dict[str, Row] = {}
    for entry in stream:
        row = {"prompt": entry["question"], "answer": entry["answer"], "kind": kind, "entry": json.dumps(entry)}
        found.setdefault(prompt_key(row["prompt"]), row)
    return {
        split: tuple(row for key, row in found.items() if int(key, 16) % 10 in buckets)
        for split, buckets in SPLITS.items()
    }


def make_rows(split: str, size: int, seed: int) -> list[Row]:
    """`size` rows of a split, the kinds taking turns: `prompt`, `answer`, `kind`, and `entry` (JSON) for the verifier.

    Raises ValueError when a kind has too few distinct prompts.
    """
    each = -(-size // len(KINDS))
    pools = [distinct_rows(kind, seed)[split][:each] for kind in KINDS]
    if (smallest := min(map(len, pools))) < each:
        raise ValueError(
            f"Expected at most {smallest * len(KINDS)} rows of the {split} split; found size={size}. Lower it."
        )
    return [row for turn in zip(*pools, strict=True) for row in turn][:size]


@cache
def scorer(kind: str) -> Any:
    """The dataset whose `score_answer` is the verifier of a kind."""
    return reasoning_gym.create_dataset(kind, size=1, seed=0, **KINDS[kind].settings)


def is_correct(completion: str, kind: str, entry: str) -> bool:
    """Whether reasoning-gym gives the answer full marks. Partial credit is wrong, and so is what it cannot score."""
    try:
        return scorer(kind).score_answer(completion, json.loads(entry)) >= 1.0
    except Exception:
        return False


def correct(completions: list[str], kind: list[str], entry: list[str], **_: object) -> list[float]:
    """Reward function in TRL's convention: 1.0 for full marks, else 0.0."""
    return [float(is_correct(*sample)) for sample in zip(completions, kind, entry, strict=True)]
