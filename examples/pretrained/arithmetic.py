"""216 short questions of reasoning-gym for a pretrained chat model: products, sums and greatest common divisors.

    python -m examples.pretrained.arithmetic > runs/pretrained/arithmetic.jsonl

The questions and answers are reasoning-gym's. The answer of the assistant is begun with "The answer is ", so that four
tokens are enough: asked plainly, SmolLM2-135M answers in sentences. Right is a completion that begins with the number.
reasoning-gym's own verifier wants the number alone, or gives part of the marks to it inside a longer text.
"""

from __future__ import annotations

import json
import re
from typing import Any

KINDS: dict[str, dict[str, int]] = {
    "products": {"min_digits": 1, "max_digits": 1},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "gcd": {"max_value": 20},
}
TEXT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\nThe answer is "
)
"""SmolLM2's chat format, written out because the assistant's turn is begun."""
NUMBER = re.compile(r"\s*(-?\d+)(?![.,]?\d|\s*[-+*/^=%x])")
"""A whole number at the start: not the first one of a decimal or of "3 * 4 = 12"."""
EACH = 72


def make_rows(each: int = EACH, seed: int = 0) -> list[dict[str, Any]]:
    """`each` distinct questions of each kind, the kinds taking turns: `prompt`, `answer`, `kind`."""
    import reasoning_gym

    pools = []
    for kind, settings in KINDS.items():
        stream = reasoning_gym.create_dataset(kind, size=each * 20, seed=seed, **settings)
        distinct = {entry["question"]: entry["answer"] for entry in stream}
        pools.append([(kind, question, answer) for question, answer in distinct.items()][:each])
    return [
        {"prompt": TEXT.format(question), "answer": answer, "kind": kind}
        for turn in zip(*pools, strict=True)
        for kind, question, answer in turn
    ]


def correct(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Reward function in TRL's convention: 1.0 where the completion begins with the right number, else 0.0."""
    found = [NUMBER.match(text) for text in completions]
    return [float(match is not None and match[1] == right) for match, right in zip(found, answer, strict=True)]


if __name__ == "__main__":
    for row in make_rows():
        print(json.dumps(row))
