"""Training runs with and without a guard, what must be the same in both, and the faults that are put into them."""

import asyncio
import json
import time
import types
from dataclasses import dataclass, field, replace
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
    """The result of a run.

    Attributes:
        trainer, guard: after the run; guard is None without one.
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

    def of(self, *kinds):
        return [event for event in self.events if event["event"] in kinds]

    @property
    def refreshes(self):
        """Step and event, "refresh" or "failed_refresh", of each refresh."""
        return [(event["step"], event["event"]) for event in self.of("refresh", "failed_refresh")]

    @property
    def failed(self):
        """Whether each refresh failed, in order."""
        return [event == "failed_refresh" for _, event in self.refreshes]


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
    """Unguarded runs, one for each configuration of the trainer."""

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
    """A sampler that returns the same completions for every prompt, passed through `change`."""

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
    """Calls `action` at one event of one step."""

    def __init__(self, event, step, action):
        self.step, self.action = step, action
        setattr(self, event, self._on_event)

    def _on_event(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


class Broken(types.ModuleType):
    """A tracker that raises on every call, where `down` says so."""

    AlertLevel = types.SimpleNamespace(WARN="warn")
    run = object()

    def __init__(self, name, down=lambda: True):
        super().__init__(name)
        self._down = down

    def alert(self, *_, **__):
        if self._down():
            raise ConnectionError("the tracker is down")

    log = Image = alert


class FullFile:
    """A file on a disk that has room for half a line."""

    def __init__(self, file):
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, text):
        self._file.write(text[:20])
        self._file.flush()
        raise OSError(28, "No space left on device")


def fill_the_disk(monkeypatch, full=lambda: True):
    """Let what is appended to a journal meet a full disk, where `full` says so."""
    opened = Path.open

    def open_on_full_disk(path, mode="r", **kwargs):
        file = opened(path, mode, **kwargs)
        return FullFile(file) if path.name == "passk_guard.jsonl" and mode == "a" and full() else file

    monkeypatch.setattr(Path, "open", open_on_full_disk)


def raises(completions, **_):
    torch.rand(3)
    raise ValueError("no verdict today")


def exits(completions, **_):
    raise SystemExit("the model wrote exit()")


def hangs(completions, **_):
    torch.rand(3)
    time.sleep(60)


def hangs_busily(completions, **_):
    while True:
        torch.rand(3)


async def hangs_later(completions, **_):
    await asyncio.sleep(60)


def texts(completions, **_):
    torch.rand(3)
    return ["correct"] * len(completions)


def nothing(completions, **_):
    return None


def not_numbers(completions, **_):
    return [float("nan")] * len(completions)


VERIFIERS = {
    raises: "`raises` raised on each of 96 samples, first ValueError: no verdict today",
    exits: "SystemExit: the model wrote exit()",
    hangs: "`hangs` was still running after 0.2 s",
    hangs_busily: "`hangs_busily` was still running after 0.2 s",
    hangs_later: "`hangs_later` was still running after 0.2 s",
    texts: "a reward 'correct' of type str",
    nothing: "returned NoneType None",
    not_numbers: "no prompt has 4 samples with a verdict",
}
"""Verifiers that give no verdict, and the reason that a refresh of 96 samples then fails with."""


def changed(**fields):
    return lambda samples: replace(samples, **{k: change(samples) for k, change in fields.items()})


def no_sampler(samples):
    raise ConnectionError("the server for generation is gone")


SAMPLERS = {
    "no completions": (changed(completion_ids=lambda s: [], completions=lambda s: []), "96 prompts, 0 completions"),
    "one short": (changed(completions=lambda s: s.completions[:-1]), "95 completions"),
    "no tokens": (changed(completion_ids=lambda s: [[] for _ in s.completion_ids]), "no token in any of 96"),
    "overlong": (changed(completion_ids=lambda s: [[7] * 100] * len(s)), "positions for 64"),
    "token id above": (changed(completion_ids=lambda s: [[7, 76]] * len(s)), "token id 76; the model has ids from 0"),
    "token id below": (changed(completion_ids=lambda s: [[-1, 7]] * len(s)), "token id -1"),
    "no samples": (lambda samples: None, "AttributeError"),
    "raises": (no_sampler, "ConnectionError: the server for generation is gone"),
}
"""What a sampler can make of 96 samples, and the reason that the refresh then fails with."""
