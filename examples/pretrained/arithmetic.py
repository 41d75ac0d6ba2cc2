"""216 short questions of reasoning-gym for a pretrained chat model: products, sums and greatest common divisors.

    python -m examples.pretrained.arithmetic > runs/pretrained/arithmetic.jsonl

The questions and answers are reasoning-gym's. Its own verifier gives part of the marks to an answer inside a longer
text; here only the bare number is right, so that four tokens are enough.
"""

from __future__ import annotations

import json
from typing import Any

KINDS: dict[str, dict[str, int]] = {
    "products": {"min_digits": 1, "max_digits": 1},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "gcd": {"max_value": 20},
}
EACH = 72


def make_rows(each: int = EACH, seed: int = 0) -> list[dict[str, Any]]:
    """`each` distinct questions of each kind, the kinds taking turns: `prompt` (a chat), `answer`, `kind`."""
    import reasoning_gym

    pools = []
    for kind, settings in KINDS.items():
        stream = reasoning_gym.create_dataset(kind, size=each * 20, seed=seed, **settings)
        distinct = {entry["question"]: entry["answer"] for entry in stream}
        pools.append([(kind, question, answer) for question, answer in distinct.items()][:each])
    return [
        {"prompt": [{"role": "user", "content": question}], "answer": answer, "kind": kind}
        for turn in zip(*pools, strict=True)
        for kind, question, answer in turn
    ]


def correct(completions: list[Any], answer: list[str], **_: object) -> list[float]:
    """Reward function in TRL's convention: 1.0 for the bare number, a full stop after it allowed, else 0.0."""
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [float(text.strip().removesuffix(".") == right) for text, right in zip(texts, answer, strict=True)]


if __name__ == "__main__":
    for row in make_rows():
        print(json.dumps(row))
