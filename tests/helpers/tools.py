"""Trainers whose random model calls tools: a turn that begins with a digit calls the first tool with it."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOTrainer

from tests.helpers.tiny import tiny_chat_rows, tiny_grpo_trainer, tiny_model, tiny_tokenizer

SUPPORTED = "_standalone_tools" in inspect.getsource(inspect.unwrap(GRPOTrainer.__init__))
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + ('system' if m['role'] == 'tool' else m['role']) + '|>' }}"
    "{% for call in m.get('tool_calls') or [] %}{{ call['function']['name'] + call['function']['arguments'] | string }}"
    "{% endfor %}{% if m['role'] == 'tool' %}{{ m['name'] }}{% endif %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def parse(tokenizer: Any, ids: list[int], prefix: Any = None, tools: Any = None) -> dict[str, Any]:
    """In the place of TRL's parser, whose formats a random model would never write."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if text[:1].isdigit() and tools:
        call = {"name": tools[0].__name__, "arguments": {"digit": int(text[0])}}
        message["tool_calls"] = [{"type": "function", "function": call}]
    return message


def double(digit: int) -> int:
    """Twice a digit.

    Args:
        digit: to double.
    """
    if digit == 0:
        raise ValueError("no zeros")
    return 2 * digit


def last_turn(completions: Any, **_: Any) -> list[float]:
    """Whether there is a letter in the last message, which is not always right."""
    return [float(any(c.isalpha() for c in messages[-1]["content"])) for messages in completions]


def talkative(tokenizer: Any) -> Any:
    """A random model that often writes digits and soon ends."""
    model = tiny_model(max_position_embeddings=128, tie_word_embeddings=False)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    with torch.no_grad():
        model.lm_head.bias[tokenizer.eos_token_id] = 3.0
        model.lm_head.bias[tokenizer("0123456789")["input_ids"]] = 2.0
    return model


def tool_trainer(tmp_path: Any, monkeypatch: Any, **args: Any) -> Any:
    """A GRPOTrainer of conversations with `double`, or with the environments or rollout function in `args`."""
    monkeypatch.setattr(importlib.import_module("trl.trainer.grpo_trainer"), "parse_response", parse)
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    tokenizer.response_template = "not None"
    given = {"max_completion_length": 32, "max_tool_calling_iterations": 2, "max_steps": 3} | args
    own = {name: given.pop(name) for name in ("environment_factory", "rollout_func", "tools") if name in given}
    if isinstance(given.get("reward_funcs"), list):
        given["reward_funcs"] = list(given["reward_funcs"])  # which the trainer appends to
    model = talkative(tokenizer)
    settings = {"tokenizer": tokenizer, "model": model, "reward_funcs": last_turn, "extra": own or {"tools": [double]}}
    return tiny_grpo_trainer(tmp_path, **settings | {"train_dataset": Dataset.from_list(tiny_chat_rows(32))} | given)


def chat_probe(count: int = 12, **columns: Any) -> list[dict[str, Any]]:
    """Conversations that are not in the training set."""
    return [{"prompt": [{"role": "user", "content": f"{i}-{i}?"}], **columns} for i in range(count)]


class Counter:
    """An environment that counts its calls; how many were made and closed is counted."""

    made, closed = 0, 0

    def __init__(self):
        Counter.made += 1
        self.total, self.open = None, True

    def reset(self, **row):
        self.total = len(str(row["prompt"][0]["content"]))
        return f" at {self.total}"

    def add(self, digit: int) -> int:
        """Add a digit.

        Args:
            digit: to add.
        """
        self.total += digit
        torch.rand(1)
        return self.total

    def get_reward(self):
        assert self.open, "read before it was closed"
        return float(self.total % 2)

    def _close(self):
        Counter.closed += 1
        self.open = False
