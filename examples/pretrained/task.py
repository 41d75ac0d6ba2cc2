"""char_count: how often a letter occurs in a spelled word, answered after a written-out count.

    How many n are there in n-i-n-e?
    n1 i1 n2 e2 = 2

Each letter of the word comes with the count so far, and the last count once more as the answer. Words of 2, 4, 6 and 8
letters go from easy to hard. Only the whole text is right: an answer without its count, with another count, or with
more text after it is wrong. So one text is right for each prompt, and its probability is one forward pass.

The task is the published recipe "char_count" for this model; the words and the form of the count are our own.
"""

from __future__ import annotations

import hashlib
import random
import string
from typing import Any

LENGTHS = (2, 4, 6, 8)
SPLITS = {"sft": range(4), "train": range(4, 7), "probe": range(7, 8), "test": range(8, 10)}  # of ten hash buckets

Row = dict[str, Any]


def make_prompt(letter: str, word: str) -> str:
    return f"How many {letter} are there in {'-'.join(word)}?\n"


def right_answer(letter: str, word: str) -> str:
    """The one text that is right."""
    counts = [word[: i + 1].count(letter) for i in range(len(word))]
    return " ".join(f"{one}{count}" for one, count in zip(word, counts, strict=True)) + f" = {counts[-1]}"


def answer_tokens(length: int) -> int:
    """Of a word of so many letters: letter and count of each, then " =", " ", the answer, end-of-sequence."""
    return 2 * length + 4


def split_of(prompt: str) -> str:
    """The split a prompt belongs to, whatever the seed."""
    bucket = hashlib.sha256(prompt.encode()).digest()[0] % 10
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def make_rows(split: str, size: int, seed: int, longest: int = max(LENGTHS)) -> list[Row]:
    """`size` distinct prompts of a split, the lengths up to `longest` taking turns: `prompt`, `answer`, `length`.

    The letter is uniform over the alphabet. Its count is uniform from 0 to one less than the length of the word, as far
    as there are words of two letters. The other letters are uniform over the rest.
    """
    rng = random.Random(f"{split}/{seed}")
    lengths = [length for length in LENGTHS if length <= longest]
    rows: dict[str, Row] = {}
    while len(rows) < size:
        length = lengths[len(rows) % len(lengths)]
        letter, count = rng.choice(string.ascii_lowercase), rng.randrange(length)
        others = rng.choices(string.ascii_lowercase.replace(letter, ""), k=length - count)
        word = "".join(rng.sample([*letter * count, *others], length))
        prompt = make_prompt(letter, word)
        if split_of(prompt) == split:
            rows.setdefault(prompt, {"prompt": prompt, "answer": right_answer(letter, word), "length": length})
    return list(rows.values())


def correct(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Reward function in TRL's convention: 1.0 for the whole right text and nothing else, else 0.0."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]
