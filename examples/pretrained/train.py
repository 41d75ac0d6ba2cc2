"""The two trainings: a short supervised one for the form of the answer, then GRPO on pass@k with the guard attached.

Left out: vLLM, checkpoints, several epochs over the same samples, a KL penalty.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from examples.pretrained.evaluation import encode
from examples.pretrained.task import answer_tokens, correct, make_rows
from passk_guard import PassKObjective, watch


@dataclass(frozen=True)
class Plan:
    """The size of everything. `Plan()` is the full run, `QUICK` the one for two CPU cores.

    Attributes:
        k: of pass@k, in training and in the guard.
        longest: letters of the longest words, one of `LENGTHS`.
        sft_steps, sft_batch, sft_rate: supervised steps, prompts in each, first learning rate.
        steps, prompts_per_step, samples, learning_rate: of GRPO; `samples` of each prompt.
        refresh_steps, probe_prompts, probe_set: of the guard, see `GuardConfig`; prompts the probe is drawn from.
        test_prompts: on which p(x) is computed before and after.
    """

    k: int = 8
    longest: int = 8
    sft_steps: int = 100
    sft_batch: int = 32
    sft_rate: float = 1e-4
    steps: int = 201  # the last step begins with a refresh, so that the change of those before it is measured
    prompts_per_step: int = 32
    samples: int = 16
    learning_rate: float = 5e-6
    refresh_steps: int = 10
    probe_prompts: int = 128
    probe_set: int = 1024
    test_prompts: int = 1024


QUICK = Plan(
    k=4,
    longest=4,
    sft_steps=8,
    sft_batch=16,
    steps=13,
    prompts_per_step=3,
    samples=8,
    learning_rate=1e-5,
    refresh_steps=6,
    probe_prompts=12,
    probe_set=96,
    test_prompts=64,
)


def sft(model_dir: Path, cache: Path, plan: Plan, seed: int) -> Path:
    """The folder of the model after the supervised steps; trained on the first call, reused afterwards."""
    target = cache / f"sft-{plan.longest}-{plan.sft_steps}x{plan.sft_batch}-seed{seed}"
    if target.exists():
        return target
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    fit(model, tokenizer, plan, seed)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(target)
    return target


def fit(model: PreTrainedModel, tokenizer: Any, plan: Plan, seed: int) -> None:
    """AdamW on the answers alone, in place; the learning rate falls linearly to 0."""
    rows = make_rows("sft", plan.sft_steps * plan.sft_batch, seed, plan.longest)
    random.Random(seed).shuffle(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.sft_rate, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / plan.sft_steps)
    bar = tqdm(range(plan.sft_steps), desc=f"supervised, seed {seed}", disable=None)
    model.train()
    for step in bar:
        batch = encode(tokenizer, rows[step * plan.sft_batch : (step + 1) * plan.sft_batch])
        loss = model(**{name: x.to(model.device) for name, x in batch.items()}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def make_config(output_dir: Path, plan: Plan, seed: int, **more: Any) -> GRPOConfig:
    """TRL's settings; what is not named here is TRL's default, AdamW and clipping at norm 1 among it."""
    on_gpu = torch.cuda.is_available()
    settings = {
        "max_steps": plan.steps,
        "seed": seed,
        "per_device_train_batch_size": plan.prompts_per_step * plan.samples,
        "num_generations": plan.samples,
        "max_completion_length": answer_tokens(plan.longest),
        "loss_type": "dr_grpo",
        "scale_rewards": "none",  # dividing by the group's deviation would cancel the pass@k weights
        "beta": 0.0,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "gradient_checkpointing": False,
    }
    return GRPOConfig(output_dir=str(output_dir), **settings | more)


def grpo(model_dir: Path, out: Path, plan: Plan, seed: int, mitigation: str) -> tuple[PreTrainedModel, list[dict]]:
    """Train on pass@k from the supervised model, guarded; the model, and the events of the guard's journal.

    Args:
        mitigation: "none" observes; any other is the guard's setting of that name.
    """
    out.mkdir(parents=True, exist_ok=True)
    journal = out / "passk_guard.jsonl"
    journal.unlink(missing_ok=True)  # the guard appends, for runs that are resumed
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir),
        reward_funcs=[correct],
        args=make_config(out, plan, seed),
        train_dataset=Dataset.from_list(make_rows("train", plan.steps * plan.prompts_per_step, seed, plan.longest)),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    watch(
        trainer,
        probe=make_rows("probe", plan.probe_set, seed, plan.longest),
        correct=correct,
        k=plan.k,
        mitigation="off" if mitigation == "none" else mitigation,
        refresh_steps=plan.refresh_steps,
        probe_prompts=plan.probe_prompts,
        num_samples=plan.samples,
        group_by="length",
        probe_seed=seed,
    )
    trainer.remove_callback(PrinterCallback)
    with PassKObjective(trainer, k=plan.k):
        trainer.train()
    return trainer.model, [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
