"""Families whose parameters no formula covers, against autograd; `python -m benchmarks.families` prints all."""

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from benchmarks import families
from passk_guard.sketch import ScoreSketcher

HARD = ["mixtral", "mixtral, batched_mm", "mixtral, grouped_mm, float32", "qwen3_moe", "deepseek_v3", "falcon", "opt"]
HARD += ["mamba2", "bart", "qwen2 + LoRA", "qwen2 + DoRA", "qwen2 + IA3", "mixtral + LoRA on experts"]


@pytest.mark.parametrize("name", HARD)
def test_covered_in_full_and_as_autograd_says(name):
    row = families.measure(name, families.FAMILIES[name])
    if row.covered is None and Version(transformers.__version__) < Version("5.20"):
        assert not row.remark.startswith("refused")
        pytest.skip(row.remark)  # the oldest transformers and peft lack some
    assert (row.covered, row.remark) == (1.0, "")
    assert row.error <= families.TOLERANCE


class MixesSamples(torch.nn.Module):
    """Scales by its own weight, with the mean over the batch: no sample has a gradient of its own."""

    def __init__(self, width):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(width, dtype=torch.float64))

    def forward(self, x):
        return x + x.mean(0, keepdim=True) * self.scale


def test_a_wrong_number_is_never_silent(monkeypatch, capsys):
    """What mixes samples is not covered; a wrong gradient ends the script with an error."""

    def mixing():
        model = families.causal_lm("llama")
        model.model.norm = torch.nn.Sequential(model.model.norm, MixesSamples(16))
        return model

    assert "model.norm.scale" in families.measure("mixing", mixing).remark
    monkeypatch.setattr(families, "FAMILIES", {"llama": families.FAMILIES["llama"]})
    assert families.main(["llama"]) == 0
    monkeypatch.setattr("passk_guard.sketch.layers.normalised_input", lambda module, x: x)
    monkeypatch.setattr("passk_guard.sketch.hooks.formula_holds", lambda *_: True)
    assert families.main(["llama"]) == 1
    assert "WRONG: model." in capsys.readouterr().out


def test_the_table_in_the_docs_has_all_rows():
    text = (Path(families.__file__).parents[1] / "docs" / "results" / "families.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert set(families.FAMILIES) <= set(rows)


@pytest.mark.parametrize("method", ["kronecker", "countsketch"])
def test_gradients_that_autograd_formed_keep_their_inner_products(method):
    model, batch, dim = families.FAMILIES["mixtral"](), families._batch(), 4096
    rows = torch.stack([torch.cat([g.flatten() for g in sample.values()]) for sample in families.exact(model, batch)])
    found = torch.stack([ScoreSketcher(model, dim, method, seed).sketch(**batch, num_slots=4) for seed in range(6)])
    scale = rows.norm(dim=1)[:, None] * rows.norm(dim=1)
    errors = (found @ found.mT - rows @ rows.T) / scale
    assert float(errors.square().mean().sqrt()) < 2 / dim**0.5
    assert float(errors.mean(0).abs().max()) < 4 / (6 * dim) ** 0.5
