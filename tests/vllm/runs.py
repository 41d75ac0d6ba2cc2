"""Tiny models that vLLM can serve, and TRL trainers that sample with it in their own process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.helpers.tiny import (
    digit_reward,
    probe_rows,
    tiny_grpo_trainer,
    tiny_model,
    tiny_rloo_trainer,
    tiny_tokenizer,
)

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 128}
"""Heads of 32, the smallest that vLLM's attention takes on a CPU."""

GUARD = {"k": 4, "num_samples": 8, "probe_prompts": 12, "refresh_steps": 1, "sketch_dim": 1024}


def served_model(folder: Path, **overrides: Any) -> Any:
    """A random Llama in float32 whose weights and tokenizer are in `folder`, from where vLLM reads them."""
    if not (folder / "config.json").exists():
        tiny_model("llama", **(SHAPE | overrides)).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def vllm_trainer(folder: Path, weights: Path, kind: str = "grpo", **args: Any) -> Any:
    """A trainer of 8 completions a step, sampled by vLLM in this process; `args` are fields of its config."""
    settings: dict[str, Any] = {
        "model": served_model(weights),
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.2,
        "vllm_max_model_length": 64,
        "max_steps": 4,
    }
    return {"grpo": tiny_grpo_trainer, "rloo": tiny_rloo_trainer}[kind](folder, **(settings | args))


def watched(trainer: Any, **settings: Any) -> Any:
    """The guard, observing 12 prompts x 8 samples before every step."""
    import passk_guard

    return passk_guard.watch(trainer, probe=probe_rows(), correct=digit_reward, **(GUARD | settings))


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of them."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def use_one_engine(patch: Any) -> None:
    """One vLLM for all trainers of this process with the same settings, without compilation, which takes minutes.

    Weights come from the trainer before each sampling, and random numbers from torch's generator, so that nothing of
    one trainer is left for the next.
    """
    from trl.generation import vllm_generation

    patch.setattr(vllm_generation, "LLM", _one_engine)


@functools.cache
def _one_engine(**settings: Any) -> Any:
    from vllm import LLM

    return LLM(enforce_eager=True, **settings)
