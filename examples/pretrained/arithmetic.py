"""216 short questions of reasoning-gym for a pretrained chat model: products, sums and greatest common divisors.

    python -m examples.pretrained.arithmetic > runs/pretrained/arithmetic.jsonl

The questions and answers are reasoning-gym's. Its own verifier gives part of the marks to an answer inside a longer
text; here only the bare number is right, so that four tokens are enough. Asked without an example the model answers in
sentences. So a system message asks for the number alone, and one solved question of the same kind comes before.
"""

from __future__ import annotations

import json
from typing import Any

KINDS: dict[str, dict[str, int]] = {
    "products": {"min_digits": 1, "max_digits": 1},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "gcd": {"max_value": 20},
}
EXAMPLES = {
    "products": ("Solve the following multiplication: 3 * 4. Give only the result as your final answer.", "12"),
    "chain_sum": ("State the final answer to the following arithmetic problem: 21 + 8 =", "29"),
    "gcd": (
        "Find the Greatest Common Divisor (GCD) of these numbers: 6, 9. Give only the GCD as your final answer.",
        "3",
    ),
}
EACH = 72


def make_rows(each: int = EACH, seed: int = 0) -> list[dict[str, Any]]:
    """`each` distinct questions of each kind, the kinds taking turns: `prompt` (a chat), `answer`, `kind`."""
    import reasoning_gym

    pools = []
    for kind, settings in KINDS.items():
        stream = reasoning_gym.create_dataset(kind, size=each * 20, seed=seed, **settings)
        distinct = {entry["question"]: entry["answer"] for entry in stream if entry["question"] != EXAMPLES[kind][0]}
        pools.append([(kind, question, answer) for question, answer in distinct.items()][:each])
    return [
        {"prompt": chat(kind, question), "answer": answer, "kind": kind}
        for turn in zip(*pools, strict=True)
        for kind, question, answer in turn
    ]


def chat(kind: str, question: str) -> list[dict[str, str]]:
    """The system message, the solved question of this kind, and the question."""
    turns = [("system", "Answer with the number alone."), *zip(("user", "assistant"), EXAMPLES[kind], strict=True)]
    return [{"role": role, "content": text} for role, text in [*turns, ("user", question)]]


def correct(completions: list[Any], answer: list[str], **_: object) -> list[float]:
    """Reward function in TRL's convention: 1.0 for the bare number, a full stop after it allowed, else 0.0."""
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [float(text.strip().removesuffix(".") == right) for text, right in zip(texts, answer, strict=True)]


if __name__ == "__main__":
    for row in make_rows():
        print(json.dumps(row))
