"""The interference task: four digits to rearrange, and two kinds of prompt that want opposite answers.

A prompt is `[tag][op]d1d2d3d4=`, e.g. `gS5301=`, and the answer is four digits:

    kind      share   op   tag     right answer
    easy       70 %   S    e..p    the digits in ascending order
    hard       15 %   S    a..d    the digits in descending order
    neutral    15 %   R    any     the digits reversed

A warm-started model sorts ascending whatever the tag says, so easy prompts succeed and hard ones fail. Both kinds
share every parameter: a step that teaches "descending" on hard prompts makes easy ones worse until the model has
learned to read the tag. That is prompt interference (arXiv 2602.21189) small enough to be computed exactly.

Left out on purpose: partial credit, several right answers, answers of different lengths. One right string per
prompt is what makes p(x) exact (see exact.py).
"""

from __future__ import annotations

import hashlib
import random
from functools import cache
from itertools import permutations, product

HARD_TAGS, EASY_TAGS = "abcd", "efghijklmnop"
TAGS, OPS, DIGITS = HARD_TAGS + EASY_TAGS, "SR", "0123456789"
ALPHABET = TAGS + OPS + DIGITS + "="

# kind -> (operation, tags it is drawn from)
KINDS = {"easy": ("S", EASY_TAGS), "hard": ("S", HARD_TAGS), "neutral": ("R", TAGS)}
MIXTURE = {"easy": 0.70, "hard": 0.15, "neutral": 0.15}

# Of ten hash buckets: how the 5040 ordered tuples of distinct digits are shared out.
SPLITS = {"train": range(6), "probe": range(6, 8), "test": range(8, 10)}


@cache
def tuples(split: str) -> tuple[str, ...]:
    """The digit strings of a split. A content hash, so that no seed or Python version ever moves one."""
    if split not in SPLITS:
        raise ValueError(f"Expected `split` to be one of {list(SPLITS)}; found {split!r}.")
    every = ("".join(digits) for digits in permutations(DIGITS, 4))
    return tuple(d for d in every if hashlib.sha256(d.encode()).digest()[0] % 10 in SPLITS[split])


def right_answer(kind: str, digits: str) -> str:
    """The one string that is right on a prompt of this kind."""
    ascending = "".join(sorted(digits))
    return {"easy": ascending, "hard": ascending[::-1], "neutral": digits[::-1]}[kind]


def make_prompts(
    split: str, size: int, seed: int, mixture: dict[str, float] = MIXTURE, *, cue: bool = True
) -> list[dict[str, str]]:
    """`size` distinct prompts of a split, in random order, as rows of `prompt`, `answer` and `kind`.

    The shares of `mixture` hold exactly (up to rounding, which goes to the last kind), so that J_k does not move
    with the draw. Without `cue` the tag says nothing: a hash of the prompt makes it easy or hard, which no model can
    foresee, so that the conflict between the two is irreducible. Raises ValueError when a kind has too few distinct
    prompts.
    """
    kinds = list(mixture)
    counts = [round(mixture[kind] * size) for kind in kinds[:-1]]
    counts.append(size - sum(counts))

    rows = []
    for kind, count in zip(kinds, counts, strict=True):
        op, tags = KINDS[kind]
        every = list(product(tags, tuples(split))) if cue else _by_hash(kind, split)
        if count > len(every):
            raise ValueError(
                f"Expected `size` to ask for at most {len(every)} distinct {kind} prompts of the {split} split; "
                f"found {count}. Lower `size`."
            )
        # Seeded with a string: the kinds are drawn independently, and the same in every process.
        for tag, digits in random.Random(f"{split}/{kind}/{seed}").sample(every, count):
            rows.append({"prompt": f"{tag}{op}{digits}=", "answer": right_answer(kind, digits), "kind": kind})
    random.Random(f"{split}/order/{seed}").shuffle(rows)
    return rows


def _by_hash(kind: str, split: str) -> list[tuple[str, str]]:
    """The (tag, digits) of a kind where the tag is no cue; hard in 3 of 17, as 0.15 is of 0.85."""
    every = product(TAGS, tuples(split))
    if kind == "neutral":
        return list(every)
    return [(t, d) for t, d in every if (hashlib.sha256(f"{t}{d}".encode()).digest()[1] % 17 < 3) == (kind == "hard")]


def correct(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Reward function in TRL's convention: 1.0 for the exact answer, else 0.0."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def supervised_example(rng: random.Random) -> tuple[str, str]:
    """One (prompt, answer) of the warm start, whose answer never depends on the tag.

    S (70 % of the prompts): 85 % ascending, 8 % descending, 7 % another order of the same digits.
    R (30 %): 10 % reversed, else copied. So the model starts with p around .84 on easy prompts, .07 on hard ones,
    and a few hundredths on neutral ones, where it has yet to learn the rare behaviour well.
    """
    digits = rng.choice(tuples("train"))
    op = "S" if rng.random() < 0.70 else "R"
    u = rng.random()
    if op == "R":
        answer = right_answer("neutral", digits) if u < 0.10 else digits
    elif u < 0.93:
        answer = right_answer("easy" if u < 0.85 else "hard", digits)
    else:
        answer = another_order(digits, rng)
    return f"{rng.choice(TAGS)}{op}{digits}=", answer


def another_order(digits: str, rng: random.Random) -> str:
    """The digits in a random order that is neither ascending nor descending."""
    sorted_either_way = (right_answer("easy", digits), right_answer("hard", digits))
    while True:
        answer = "".join(rng.sample(digits, len(digits)))
        if answer not in sorted_either_way:
            return answer
