"""The snippets of docs/integrations.md run, against stand-ins for the frameworks and in real trainers."""

from __future__ import annotations

import importlib
import json
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from transformers import Trainer, TrainerCallback

import passk_guard
from passk_guard import PassKGuardCallback, passk_advantages
from tests.helpers.tiny import digit_reward, probe_rows, tiny_grpo_trainer

SMALL = {"probe_prompts": 10, "num_samples": 8, "sketch_dim": 512}  # over the defaults, which take a minute
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "integrations.md").read_text()
FILES = dict(re.findall(r"^<!-- file: (\S+) -->\n```python\n(.*?)^```", PAGE, flags=re.M | re.S))


def accuracy(completions, **_):
    return digit_reward(completions)


def conversational_rows():
    return [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": "7"} for row in probe_rows()]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the page's files and the probe, that is the working directory and can be imported from."""
    for name, code in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py").replace("/", "."), raising=False)
    monkeypatch.setattr(passk_guard, "watch", partial(passk_guard.watch, **SMALL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_probe(probe_rows())
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py").replace("/", "."), None)


def write_probe(rows):
    Path("held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def stand_in(monkeypatch, name, **content):
    """A module of this name, and the packages above it."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(parts[depth - 1]))
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def guards(trainer):
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, PassKGuardCallback)]


def refreshes(trainer):
    return [row for row in trainer.state.log_history if "passk_guard/pass_at_8" in row]


def test_every_file_of_the_page_is_here():
    assert set(FILES) == {"my_project/passk.py", "passk_plugin.py", "guarded.py", "passk_advantage.py"}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S):
        compile(code, "integrations.md", "exec")


def test_axolotl_plugin(project, monkeypatch):
    class BasePlugin:
        def add_callbacks_post_trainer(self, cfg, trainer):
            return []

    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=BasePlugin)
    settings = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```", PAGE, flags=re.M | re.S)[1])
    module, name = settings["plugins"][0].rsplit(".", 1)
    plugin = getattr(importlib.import_module(module), name)()
    assert isinstance(plugin, BasePlugin)

    trainer = tiny_grpo_trainer(project / "out", reward_funcs=[accuracy], max_steps=1)
    for callback in plugin.add_callbacks_post_trainer(SimpleNamespace(**settings), trainer):
        trainer.add_callback(callback)
    assert len(guards(trainer)) == 1
    trainer.train()
    assert refreshes(trainer)


class SwiftCallback(TrainerCallback):
    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer


def test_swift_callback_waits_for_the_rewards(project, monkeypatch):
    callbacks_map = {}
    stand_in(monkeypatch, "swift.callbacks", TrainerCallback=SwiftCallback, callbacks_map=callbacks_map)
    write_probe(conversational_rows())
    importlib.import_module("passk_plugin")
    asked = re.search(r"--external_plugins (\S+) --callbacks (\S+)", PAGE)
    assert asked[1] in FILES
    trainer = tiny_grpo_trainer(project / "out", max_steps=2, save_strategy="steps", save_steps=1)
    functions = trainer.__dict__.pop("reward_funcs")
    trainer.add_callback(callbacks_map[asked[2]](trainer.args, trainer))  # in the constructor: no rewards yet
    trainer.reward_funcs = functions
    trainer.train()
    assert refreshes(trainer)
    assert list(project.glob("out/checkpoint-1/passk_guard*")), "on_save reached the guard"
    trainer.train()
    assert len(guards(trainer)) == 1


def test_guarded_adds_the_guard_and_restores_the_class(project):
    original, trainers = Trainer.train, []

    def framework_main():
        trainers.append(tiny_grpo_trainer(project / "out", max_steps=1))
        trainers[0].train()
        trainers[0].train()

    code = re.search(r"^<!-- run -->\n```python\n(.*?)^```", PAGE, flags=re.M | re.S)[1]
    guarded = importlib.import_module("guarded").guarded
    names = {"guarded": guarded, "watch": passk_guard.watch, "accuracy": accuracy}
    exec(code, names | {"framework_main": framework_main})
    assert len(guards(trainers[0])) == 1
    assert refreshes(trainers[0])
    assert Trainer.train is original
    with pytest.raises(ZeroDivisionError), guarded(lambda trainer: None):
        raise ZeroDivisionError
    assert Trainer.train is original


def test_verl_advantages_are_those_of_each_prompt(project, monkeypatch):
    registry = {}
    register = lambda name: lambda function: registry.setdefault(name, function)  # noqa: E731
    stand_in(monkeypatch, "verl.trainer.ppo.core_algos", register_adv_est=register)
    importlib.import_module("passk_advantage")
    estimate = registry[re.search(r"adv_estimator=(\w+)", PAGE)[1]]

    generator = torch.Generator().manual_seed(0)
    correct = {name: torch.randint(0, 2, (10,), generator=generator).float() for name in "xyz"}
    left = {name: iter(values) for name, values in correct.items()}
    index = np.array(list("xyz" * 10), dtype=object)
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(30, 1)
    rewards = torch.zeros(30, 4)
    rewards[:, 2] = torch.stack([next(left[name]) for name in index])
    advantages, returns = estimate(token_level_rewards=rewards, response_mask=mask, index=index, config=None)
    assert torch.equal(advantages, returns)
    for name in "xyz":
        expected = passk_advantages(correct[name][None], k=8, floor=0.5)[0]
        assert expected.any()
        assert torch.equal(advantages[torch.from_numpy(index == name)], expected[:, None] * mask[:10])


def test_the_page_names_what_exists():
    from passk_guard.estimation.verdict import step
    from passk_guard.mitigation import projection_coefficient

    assert callable(step)
    assert callable(projection_coefficient)
    assert (ROOT / "examples" / "custom_loop.py").is_file()
