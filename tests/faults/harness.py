"""A training run with or without a guard, and what must be the same in both, bit for bit."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from passk_guard import GuardConfig, PassKGuardCallback
from passk_guard.probe.samplers import Samples
from tests.helpers.tiny import digit_reward, probe_rows, tiny_grpo_trainer, tiny_lm_trainer, tiny_model

SMALL = {"k": 4, "num_samples": 8, "probe_prompts": 12, "refresh_steps": 2, "patience": 1, "sketch_dim": 1024}
SMALL |= {"probe_max_new_tokens": 4}
PROJECT = {"mitigation": "project", "gate": "always", "gamma": 0.9}
TRAINERS = {"lm": tiny_lm_trainer, "grpo": tiny_grpo_trainer}
KINDS = ["lm", pytest.param("grpo", marks=pytest.mark.slow)]


@dataclass
class Run:
    """What a run came to.

    Attributes:
        trainer, guard: after it; guard is None without one.
        weights: bits of each parameter.
        rows: loss, gradient norm and reward of each log row, as text, so that NaN equals NaN.
        error: what train() raised.
    """

    trainer: Any
    guard: Any
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    error: BaseException | None = None

    def finish(self):
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        self.weights = {n: p.detach().clone().view(torch.int32) for n, p in model.named_parameters()}
        kept = ("loss", "grad_norm", "reward", "eval_loss", "eval_reward", "step")
        self.rows = [repr({k: row[k] for k in kept if k in row}) for row in self.trainer.state.log_history]
        self.rows = [row for row in self.rows if "loss" in row or "reward" in row]
        return self

    @property
    def events(self):
        """The journal, parsed line by line."""
        path = Path(self.trainer.args.output_dir) / "passk_guard.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def of(self, kind):
        return [event for event in self.events if event["event"] == kind]


def make(kind, folder, **args):
    """A trainer whose dropout makes every disturbed random state visible in the weights."""
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    return TRAINERS[kind](folder, model=tiny_model(attention_dropout=0.2), **(settings | args))


def add_guard(trainer, *, correct=digit_reward, probe=None, sampler=None, **config):
    guard = PassKGuardCallback(
        trainer, probe_rows() if probe is None else probe, correct, GuardConfig(**(SMALL | config)), sampler
    )
    trainer.add_callback(guard)
    return guard


def train(trainer, guard=None, **how):
    """Train to the end or to an exception."""
    run = Run(trainer, guard)
    try:
        trainer.train(**how)
    except Exception as error:
        run.error = error
    return run.finish()


class References:
    """Unguarded runs, one for each configuration."""

    def __init__(self, folder):
        self._folder, self._runs = folder, {}

    def of(self, kind, prepare=None, **args):
        name = f"{kind}-{getattr(prepare, '__name__', '')}-{args}"
        if name not in self._runs:
            trainer = make(kind, self._folder / str(len(self._runs)), **args)
            if prepare is not None:
                prepare(trainer)
            self._runs[name] = train(trainer)
        return self._runs[name]


def assert_same(found, expected):
    """Parameters and losses, to the last bit."""
    assert found.rows == expected.rows
    assert found.rows, "nothing was compared"
    different = [name for name, bits in expected.weights.items() if not torch.equal(bits, found.weights[name])]
    assert not different, different


class Texts:
    """A sampler that returns the same completions of every prompt, or whatever else `change` makes of them."""

    temperature = 1.0

    def __init__(self, tokenizer, texts=("1", "a", "2b", "ccc"), change=None):
        self.tokenizer, self.texts, self.change = tokenizer, texts, change

    def check_lengths(self, rows):
        pass

    def sample(self, rows, num_samples, seed):
        texts = [self.texts[i % len(self.texts)] for _ in rows for i in range(num_samples)]
        prompts = [self.tokenizer(row["prompt"])["input_ids"] for row in rows for _ in range(num_samples)]
        samples = Samples(prompts, [self.tokenizer(t)["input_ids"] for t in texts], texts)
        return samples if self.change is None else self.change(samples)


class At(TrainerCallback):
    """Does something at an event of a step."""

    def __init__(self, event, step, action):
        self.step, self.action = step, action
        setattr(self, event, self._on_event)

    def _on_event(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()
