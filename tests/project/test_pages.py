"""README and documents: code runs, settings are valid, and what they name or link to exists.

A block of Python after `<!-- not run: why -->` is compiled only. docs/integrations.md has tests of its own.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import passk_guard
from passk_guard import passk_advantages
from passk_guard.cli import main
from passk_guard.config import config_problems
from tests.helpers.tiny import digit_reward, probe_rows, tiny_grpo_trainer, tiny_model, tiny_tokenizer
from tests.project.test_integrations import stand_in

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"])
COPIES = ROOT / "docs" / "project"  # that `make docs` makes
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES if path.parent != COPIES}
ELSEWHERE = "README.md", "docs/quickstart.md", "docs/integrations.md"  # run by tests of their own
OURS = r"https://(?:github.com/passk-guard/passk-guard/blob|raw.githubusercontent.com/passk-guard/passk-guard)/main/"
SMALL = {"probe_prompts": 10, "num_samples": 8, "sketch_dim": 512, "probe_max_new_tokens": 4}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def marked(text):
    """(marker or empty, code) of each block of Python."""
    return re.findall(r"(?:^<!-- (.*?) -->\n)?^```python\n(.*?)^```", text, flags=re.M | re.S)


def accuracy(completions, **_):
    return digit_reward(completions)


RUN = [
    pytest.param(code, id=f"{page.removeprefix('docs/')}-{number}")
    for page, text in PAGES.items()
    if page not in ELSEWHERE
    for number, (marker, code) in enumerate(marked(text))
    if not marker
]


@pytest.mark.parametrize("code", RUN)
def test_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.setattr(passk_guard, "watch", partial(passk_guard.watch, **SMALL))
    monkeypatch.chdir(tmp_path)
    names = {"passk_guard": passk_guard, "PassKObjective": passk_guard.PassKObjective, "accuracy": accuracy}
    names["held_out"] = probe_rows()
    if "trainer" in code:
        options = {"num_generations": 8, "scale_rewards": "none", "loss_type": "dr_grpo", "max_steps": 1}
        names["trainer"] = tiny_grpo_trainer(tmp_path, reward_funcs=[accuracy], **options)
    if "model" in code:
        names |= {"model": tiny_model(), "tokenizer": tiny_tokenizer()}
    exec(compile(code, "block", "exec"), names)
    if "trainer.train()" in code:
        assert names["trainer"].state.global_step == 1


def test_what_is_not_run_compiles_and_says_why():
    found = [entry for page, text in PAGES.items() if page not in ELSEWHERE for entry in marked(text) if entry[0]]
    assert len(found) >= 3
    for marker, code in found:
        assert re.match(r"not run: \w+|file: \w+", marker), marker
        compile(code, marker, "exec")


def test_the_line_of_the_front_page_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(passk_guard, "watch", partial(passk_guard.watch, **SMALL))
    added = [line[2:] for line in blocks(PAGES["docs/index.md"], "diff")[0].splitlines() if line.startswith("+ ")]
    trainer = tiny_grpo_trainer(tmp_path, reward_funcs=[accuracy], max_steps=1)
    names = {"trainer": trainer, "held_out": probe_rows(), "accuracy": accuracy, "passk_guard": passk_guard}
    exec("\n".join(added), names)
    trainer.train()
    assert any("passk_guard/pass_at_8" in row for row in trainer.state.log_history)


def test_settings_in_yaml_are_valid(tmp_path):
    found = [code for text in PAGES.values() for code in blocks(text, "yaml") if "passk_guard:" in code]
    assert found
    for code in found:
        (tmp_path / "guard.yaml").write_text(code)
        assert config_problems(tmp_path / "guard.yaml") == []


def test_json_is_json():
    for text in PAGES.values():
        for code in blocks(text, "json"):
            assert isinstance(json.loads(code), dict)


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    text, makefile = PAGES[page], (ROOT / "Makefile").read_text()
    for module in re.findall(r"python -m ((?:benchmarks|examples|tests|passk_guard)[\w.]*)", text):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    for command in set(re.findall(r"(?:^|`)passk-guard ([a-z]+)", text, flags=re.M)):
        assert main([command, "--help"]) == 0, command


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Those between pages of the site, with their anchors, are also checked by `make docs`."""
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        link = re.sub(OURS, "/", link)
        if link.startswith(("https:", "#")):
            continue
        assert page != "README.md" or link.startswith("/"), f"{link}: no address on a package index"
        assert page.startswith(("docs/", "benchmarks/")) or not link.startswith("../"), link
        folder = ROOT if link.startswith("/") else (ROOT / page).parent
        assert (folder / link.lstrip("/").partition("#")[0]).exists(), link


def test_skyrl_advantages_are_those_of_each_prompt(tmp_path, monkeypatch):
    registry = {}
    register = lambda name: lambda function: registry.setdefault(name, function)  # noqa: E731
    stand_in(monkeypatch, "skyrl.backends.skyrl_train.utils.ppo_utils", register_advantage_estimator=register)
    marker, code = marked(PAGES["docs/integrations/skyrl.md"])[0]
    assert marker == "file: skyrl_advantage.py"
    exec(compile(code, marker, "exec"), {})
    correct = torch.randint(0, 2, (3, 10), generator=torch.Generator().manual_seed(0)).float()
    mask = torch.tensor([1.0, 1.0, 0.0]).repeat(30, 1)
    index = np.array(["x", "y", "z"] * 10, dtype=object)
    rewards = torch.zeros(30, 3)
    rewards[:, 1] = correct.T.flatten()
    advantages, returns = registry["passk_floor"](rewards, mask, index, config=None)
    expected = passk_advantages(correct, k=8, floor=0.5).T.reshape(-1, 1) * mask
    assert expected.any()
    assert torch.equal(advantages, expected)
    assert torch.equal(advantages, returns)
    assert "skyrl_advantage" not in sys.modules
