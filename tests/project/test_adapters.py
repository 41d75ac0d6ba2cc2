"""The snippets of docs/integrations/rllm-slime.md, against stand-ins for what calls them."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from passk_guard import GuardError, passk_advantages

PAGE = (Path(__file__).parents[2] / "docs/integrations/rllm-slime.md").read_text()
FILES = dict(re.findall(r"^<!-- file: (\w+)\.py -->\n```python\n(.*?)^```", PAGE, flags=re.M | re.S))


@pytest.fixture
def snippet(tmp_path, monkeypatch):
    """Imports a file of the page."""
    monkeypatch.syspath_prepend(tmp_path)

    def load(name):
        (tmp_path / f"{name}.py").write_text(FILES[name])
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    yield load
    for name in FILES:
        sys.modules.pop(name, None)


def expected(correct):
    """A floor of 0.5 raises the weight of the prompt that is mostly solved."""
    found = passk_advantages(torch.tensor([correct], dtype=torch.float), k=8, floor=0.5)[0]
    assert len(set(correct)) == 1 or found.any()
    return found.tolist()


def test_rllm_estimates_each_group_by_itself(snippet, monkeypatch):
    registry, parts = {}, ["rllm", "trainer", "algorithms", "advantage"]
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(parts[depth - 1]))
    register = lambda name: lambda function: registry.setdefault(name, function)  # noqa: E731
    monkeypatch.setattr(sys.modules[".".join(parts)], "register_rllm_adv_estimator", register, raising=False)
    snippet("rllm_advantage")
    estimate = registry[re.search(r"adv_estimator: (\w+)", PAGE)[1]]
    groups = [[1, 0, 0, 1, 0, 0, 0, 0], [1] * 9 + [0], [0] * 8]
    advantages, returns = estimate(rewards=[np.array(group, dtype=float) for group in groups], algorithm_config=None)
    assert [group.tolist() for group in advantages] == [expected(group) for group in groups]
    assert all(np.array_equal(a, b) for a, b in zip(advantages, returns, strict=True))
    with pytest.raises(GuardError):
        estimate(rewards=[np.ones(7)])


def test_slime_gets_advantages_in_place_of_normalised_rewards(snippet):
    module, name = re.search(r"--custom-reward-post-process-path (\w+)\.(\w+)", PAGE).groups()
    process = getattr(snippet(module), name)
    groups = [[1, 0, 0, 1, 0, 0, 0, 0], [1] * 7 + [0], [0] * 8]
    raw = [value for group in groups for value in group]
    samples = [SimpleNamespace(get_reward_value=lambda args, value=value: value) for value in raw]
    kept, processed = process(SimpleNamespace(n_samples_per_prompt=8), samples)
    assert kept == raw, "what is logged stays what the reward function said"
    assert processed == [value for group in groups for value in expected(group)]
