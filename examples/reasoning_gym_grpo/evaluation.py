"""pass@1 and pass@k on held-out test prompts, from samples, with standard errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.reasoning_gym_grpo.policy import MAX_ANSWER
from examples.reasoning_gym_grpo.tasks import Row, is_correct
from passk_guard import GenerateSampler, pass_at_k


@dataclass(frozen=True)
class Rate:
    """A mean over prompts and its standard error."""

    mean: float
    se: float

    @classmethod
    def of(cls, values: Tensor) -> Rate:
        """Of one value a prompt, [m]. The prompts are a sample too, so this error covers both kinds of chance."""
        return cls(values.mean().item(), (values.std() / len(values) ** 0.5).item())


def count_correct(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    num_samples: int,
    seed: int,
    on_progress: Any = None,
) -> Tensor:
    """How many of `num_samples` completions of each row are right, [m]; torch's random state is left as it was."""
    sampler = GenerateSampler(model, tokenizer, max_new_tokens=MAX_ANSWER, batch_size=1024, on_progress=on_progress)
    texts = iter(sampler.sample(rows, num_samples, seed).completions)
    return torch.tensor(
        [sum(is_correct(next(texts), row["kind"], row["entry"]) for _ in range(num_samples)) for row in rows]
    )


def groups(rows: list[Row]) -> dict[str, Tensor]:
    """For "all" and for each kind, which rows belong to it, [m] bool."""
    every = torch.ones(len(rows), dtype=torch.bool)
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return {"all": every} | {kind: torch.tensor([row["kind"] == kind for row in rows]) for kind in kinds}


def pass_rates(num_correct: Tensor, num_samples: int, k: int, members: Tensor) -> Rate:
    """Unbiased pass@k over the rows in `members`."""
    return Rate.of(pass_at_k(num_samples, num_correct, k)[members])


def change(before: Tensor, after: Tensor, num_samples: int, k: int, members: Tensor) -> Rate:
    """Of pass@k, prompt by prompt: the prompts are the same, so most of their differences cancel."""
    return Rate.of((pass_at_k(num_samples, after, k) - pass_at_k(num_samples, before, k))[members])
