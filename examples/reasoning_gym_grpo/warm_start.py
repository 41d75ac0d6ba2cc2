"""Supervised warm start: the policy that GRPO begins with, cached on disk.

It plays the part of the pretrained model. It is stopped early on purpose: some tasks are nearly solved by then, others
are guessed, so that the pass rates of the prompts are spread out.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.reasoning_gym_grpo.policy import make_model, make_tokenizer
from examples.reasoning_gym_grpo.tasks import KINDS, Row, distinct_rows

BATCH, LEARNING_RATE = 128, 2e-3


def encode(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> dict[str, torch.Tensor]:
    """Left-padded input ids, mask and labels, each [B, longest]; only answer and end-of-sequence are learned."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    answers = tokenizer([row["answer"] for row in rows])["input_ids"]
    longest = max(len(p) + len(a) + 1 for p, a in zip(prompts, answers, strict=True))
    ids, labels = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        answer = [*answer, tokenizer.eos_token_id]
        pad = longest - len(prompt) - len(answer)
        ids.append([tokenizer.pad_token_id] * pad + prompt + answer)
        labels.append([-100] * (pad + len(prompt)) + answer)
    input_ids = torch.tensor(ids)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != tokenizer.pad_token_id).long(),
        "labels": torch.tensor(labels),
    }


def fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, steps: int) -> None:
    """Trains `model` in place with AdamW on equal shares of the tasks, the learning rate decaying linearly to 0."""
    rng = random.Random(seed)
    pools = [distinct_rows(kind, seed)["warm"] for kind in KINDS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    bar = tqdm(range(steps), desc=f"warm start, seed {seed}", disable=None)
    for step in bar:
        batch = [rng.choice(pools[i % len(pools)]) for i in range(BATCH)]
        loss = model(**encode(tokenizer, batch), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def warm_start_dir(cache_dir: str | Path, seed: int, steps: int) -> Path:
    """Where the warm start of a seed is, or will be."""
    return Path(cache_dir) / f"seed{seed}-{steps}steps"


def warm_start(cache_dir: str | Path, seed: int, steps: int) -> Path:
    """The directory of the warm-started model and its tokenizer; trained on the first call, reused afterwards.

    Written under a temporary name and renamed, so that an interrupted run never leaves half a model to be reused.
    """
    target = warm_start_dir(cache_dir, seed, steps)
    if target.exists():
        return target
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    fit(model, tokenizer, seed, steps)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(target)
    return target
