"""`cluster_by` of an analysis: prompts of one value are no pair and count as one draw, in every number."""

import json
from dataclasses import replace

import pytest
import torch

from passk_guard import GuardError
from passk_guard.analysis.estimates import gradient_row, jackknife_error
from passk_guard.analysis.measure import harmless_ratio, kernel_from, measure_at, prompt_records
from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.ustatistics import prompt_kernel
from tests.analysis.cases import command, quick, save_model, write_probe
from tests.helpers.populations import draw, population
from tests.helpers.tiny import probe_rows

LABELS = [f"source {i // 3}" for i in range(60)]


@pytest.fixture(scope="module")
def probe():
    found = draw(population(-0.5), 60, 16, torch.Generator().manual_seed(3))
    return replace(found, prompt_keys=LABELS)


def without(probe, label):
    rest = torch.tensor([i for i, own in enumerate(LABELS) if own != label])
    rows = torch.cat([rest, rest + 60])
    keys = [LABELS[i] for i in rest.tolist()]
    return ProbeGram(probe.gram[rows][:, rows], probe.num_samples[rest], probe.num_correct[rest], keys)


@pytest.mark.parametrize(
    "number", [harmless_ratio, lambda probe: kernel_from(probe, list(range(len(probe.num_samples)))).negative_pairs]
)
def test_errors_are_those_of_leaving_clusters_out(probe, number):
    left = [number(without(probe, label)).value for label in dict.fromkeys(LABELS)]
    assert number(probe).standard_error == pytest.approx(jackknife_error(torch.tensor(left)), rel=1e-4)


def test_a_prompt_agrees_with_those_of_other_clusters(probe):
    one = gradient_row(probe, 1)
    kernel = prompt_kernel(probe, one, one)
    for i, record in enumerate(prompt_records(probe, 8, list(range(60)), LABELS, 0.95)):
        others = torch.tensor([kernel[i, 3 * c : 3 * c + 3].sum() for c in range(20) if c != i // 3]) / 57
        if record.agreement.value is not None:
            assert record.agreement.value == pytest.approx(float(others.sum()), rel=1e-5)
            assert record.agreement.standard_error == pytest.approx(19**0.5 * float(others.std()), rel=1e-5)


def test_a_pass_rate_has_the_error_of_its_clusters_means(probe):
    rates = (probe.num_correct / probe.num_samples).double()
    found = measure_at(probe, 1, None, 0.95).pass_rate
    assert found.value == pytest.approx(float(rates.mean()))
    assert found.standard_error == pytest.approx(float(rates.view(20, 3).mean(1).std()) / 20**0.5)


def test_the_command_takes_the_column(tmp_path):
    rows = [row | {"source": i // 3, "own": i} for i, row in enumerate(probe_rows(13))]
    model, probe = save_model(tmp_path / "model"), write_probe(tmp_path / "probe.jsonl", rows)
    found = {}
    for name, more in (("none", []), ("own", ["--cluster-by", "own"]), ("source", ["--cluster-by", "source"])):
        assert command(model, probe, tmp_path / name, *more) == 0
        found[name] = json.loads((tmp_path / name / "analysis.json").read_text())
        assert found[name].pop("settings")["cluster_by"] == (more[1] if more else None)
    assert found["own"] == found["none"], "each prompt a cluster of its own"
    plain, known = (found[name]["at_k"][-1] for name in ("none", "source"))
    assert known["pass_rate"]["value"] == plain["pass_rate"]["value"]
    assert known["pass_rate"]["standard_error"] != plain["pass_rate"]["standard_error"]
    assert known["inner_product"]["value"] != plain["inner_product"]["value"], "pairs of one source are left out"
    with pytest.raises(GuardError, match="at least 3 different values in the column cluster_by='half'; found 2"):
        quick(rows=[row | {"half": i % 2} for i, row in enumerate(rows)], cluster_by="half")
