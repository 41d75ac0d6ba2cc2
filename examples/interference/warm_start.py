"""Supervised warm start: the policy that RL begins with, cached on disk by seed.

It plays the part of the pretrained model: good at the common answer, aware of the rare one, blind to the tag.

Left out: validation, checkpoints and early stopping. 600 steps are a fixed recipe, not a search.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .exact import encode
from .model import make_model
from .task import supervised_example
from .tokenizer import make_tokenizer


def supervised_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: list[tuple[str, str]]
) -> torch.Tensor:
    """Mean negative log-likelihood of the answer tokens; the prompt is given, so it is not learned."""
    ids, prompt_length = encode(tokenizer, [{"prompt": x, "answer": y} for x, y in batch])
    logits = model(input_ids=ids, use_cache=False).logits[:, prompt_length - 1 : -1]  # [B, 5, V]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, prompt_length:].flatten())


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    steps: int = 600,
    batch_size: int = 192,
    learning_rate: float = 2e-3,
) -> None:
    """Trains `model` in place with AdamW, the learning rate decaying linearly to 0."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    bar = tqdm(range(steps), desc=f"warm start, seed {seed}", disable=None)
    for step in bar:
        batch = [supervised_example(rng) for _ in range(batch_size)]
        loss = supervised_loss(model, tokenizer, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def warm_start_dir(cache_dir: str | Path, seed: int) -> Path:
    """Where the warm start of a seed is, or will be."""
    return Path(cache_dir) / f"seed{seed}"


def warm_start(cache_dir: str | Path, seed: int) -> Path:
    """The directory of the warm-started model and its tokenizer; trained on the first call, reused afterwards.

    Written under a temporary name and renamed, so that an interrupted run never leaves half a model to be reused.
    """
    target = warm_start_dir(cache_dir, seed)
    if target.exists():
        return target
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    fit(model, tokenizer, seed)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if target.exists():  # another process was faster
        shutil.rmtree(partial)
    else:
        partial.rename(target)
    return target
