"""Random models, an in-memory tokenizer and real TRL trainers, small enough for a CPU and without any download."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.models.gpt2 import GPT2Config

SPECIAL = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
CHARACTERS = list(string.digits + string.ascii_lowercase + string.ascii_uppercase + " +-=?.,:")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer(**overrides: Any) -> PreTrainedTokenizerFast:
    """One token a character, with pad, eos, unk and a chat template; 76 tokens in all."""
    vocab = {token: i for i, token in enumerate(SPECIAL + CHARACTERS)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    settings: dict[str, Any] = {
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "additional_special_tokens": SPECIAL[3:],
        "chat_template": CHAT_TEMPLATE,
    } | overrides
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def tiny_model(kind: str = "qwen2", *, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A random causal LM of two layers, width 16, context 64, for `tiny_tokenizer`; the RNG is left as it was.

    Args:
        kind: "qwen2", "llama" or "gpt2".
        seed: of the weights.
        overrides: fields of the model's config.
    """
    common: dict[str, Any] = {
        "vocab_size": len(SPECIAL + CHARACTERS),
        "initializer_range": 0.3,  # far from uniform, so that a wrong distribution shows
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    if kind == "gpt2":
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config: Any = GPT2Config(**(common | shape | dropout | overrides))
    else:
        shape = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
        }
        config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[kind](**(common | shape | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


def enable_checkpointing(model: Any) -> None:
    """Checkpoint the activations of every layer, by the name of the method in this version of transformers."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def disable_checkpointing(model: Any) -> None:
    """Its counterpart."""
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()


def tiny_rows(count: int = 8) -> list[dict[str, Any]]:
    """Rows with a `prompt` like "3+4=" and its `answer`; all prompts differ (count <= 100)."""
    return [{"prompt": f"{i // 10}+{i % 10}=", "answer": str(i // 10 + i % 10)} for i in range(count)]


def tiny_chat_rows(count: int = 8) -> list[dict[str, Any]]:
    """The same rows with conversational prompts."""
    return [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in tiny_rows(count)]


def digit_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1.0 for a completion with a digit in it, else 0.0: both happen with a random model."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(any(ch.isdigit() for ch in text)) for text in texts]


def tiny_grpo_trainer(tmp_path: Path, **args: Any) -> Any:
    """A real `trl.GRPOTrainer` on CPU; see `tiny_trainer` for the arguments."""
    from trl import GRPOConfig, GRPOTrainer

    return tiny_trainer(GRPOTrainer, GRPOConfig, tmp_path, **args)


def tiny_rloo_trainer(tmp_path: Path, **args: Any) -> Any:
    """A real `trl.RLOOTrainer` on CPU; see `tiny_trainer` for the arguments.

    beta is 0 here: RLOO's default of 0.05 loads a reference model by name, and a random model has none.
    """
    from trl import RLOOConfig, RLOOTrainer

    return tiny_trainer(RLOOTrainer, RLOOConfig, tmp_path, **({"beta": 0.0} | args))


def tiny_trainer(
    trainer_class: Any,
    config_class: Any,
    tmp_path: Path,
    *,
    model: Any = None,
    tokenizer: Any = None,
    reward_funcs: Callable[..., Any] | Sequence[Callable[..., Any]] = digit_reward,
    train_dataset: Any = None,
    callbacks: Sequence[Any] | None = None,
    peft_config: Any = None,
    extra: dict[str, Any] | None = None,
    **args: Any,
) -> Any:
    """Build a trainer of two prompts times four completions a step, four new tokens each.

    Args:
        train_dataset: a `datasets.Dataset`; by default `tiny_rows(32)`.
        extra: more arguments of the trainer.
        args: fields of the trainer's config, over the small defaults here.
    """
    from datasets import Dataset

    settings: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "seed": 0,
    } | args
    return trainer_class(
        model=tiny_model() if model is None else model,
        reward_funcs=reward_funcs,
        args=config_class(**settings),
        train_dataset=Dataset.from_list(tiny_rows(32)) if train_dataset is None else train_dataset,
        processing_class=tiny_tokenizer() if tokenizer is None else tokenizer,
        callbacks=list(callbacks or []),
        peft_config=peft_config,
        **(extra or {}),
    )


def tiny_lm_trainer(tmp_path: Path, *, model: Any = None, **args: Any) -> Any:
    """A plain `transformers.Trainer` that fine-tunes on the rows' answers; `args` are TrainingArguments."""
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "seed": 0,
    } | args
    tokenizer = tiny_tokenizer()
    texts = [row["prompt"] + row["answer"] for row in tiny_rows(64) if len(row["answer"]) == 1]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return Trainer(
        model=tiny_model() if model is None else model,
        args=TrainingArguments(**settings),
        train_dataset=[{"input_ids": i, "attention_mask": [1] * len(i), "labels": i} for i in ids],
        processing_class=tokenizer,
    )


def probe_rows(count: int = 40) -> list[dict[str, Any]]:
    """Prompts that no tiny training set holds."""
    return [{"prompt": f"{i // 10}-{i % 10}?", "answer": "x"} for i in range(count)]
