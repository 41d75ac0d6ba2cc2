"""Predictions against the real vectors of a population, projected and floored."""

from functools import cache

import pytest
import torch

from passk_guard import estimate_conflict, passk_weight, project_gradient
from passk_guard.analysis.estimates import jackknife_error
from passk_guard.analysis.measure import floored, harmless_ratio, predictions, projected
from passk_guard.analysis.settings import Settings
from passk_guard.estimation.records import ProbeGram
from passk_guard.mitigation.floor import solve_floor
from tests.helpers.populations import draw, population

SETTINGS = Settings(ks=(8,), num_samples=16, gamma=0.2, floor_gamma=0.2)


def true_gradients(pop, k, floor=0.0):
    weight = passk_weight(pop.pass_rate, k).clamp(min=floor)
    return ((pop.share * pop.pass_rate * (1 - pop.pass_rate) * weight)[:, None] * pop.means).sum(0)


def cos(a, b):
    return float(a @ b / a.norm() / b.norm())


@cache
def large_probe(cosine=-0.5):
    pop = population(cosine)
    return pop, draw(pop, 1000, 16, torch.Generator().manual_seed(0))


def test_project_foretells_the_projection_of_the_true_gradient():
    pop, probe = large_probe()
    estimate = estimate_conflict(probe.gram, probe.num_samples, probe.num_correct, 8)
    found = projected(estimate, 0.2)
    before, one = true_gradients(pop, 8), true_gradients(pop, 1)
    after = before.clone()
    project_gradient([after], [one], gamma=0.2)
    assert found.cosine.value == pytest.approx(cos(after, one), abs=0.02)
    assert found.kept.value == pytest.approx(cos(after, before), abs=0.04)
    assert found.cosine.low <= cos(after, one) <= found.cosine.high
    assert found.kept.low <= cos(after, before) <= found.kept.high


def test_the_solved_floor_brings_the_true_gradient_to_gamma():
    pop, probe = large_probe()
    found = floored(probe, SETTINGS)
    assert found.setting.startswith("floor = ")
    floor, one = float(found.setting.split()[2]), true_gradients(pop, 1)
    assert found.cosine.value == pytest.approx(0.2, abs=0.02)  # on the samples it was solved from
    assert found.cosine.low <= cos(true_gradients(pop, 8, floor), one) <= found.cosine.high
    assert found.kept.value == pytest.approx(cos(true_gradients(pop, 8, floor), true_gradients(pop, 8)), abs=0.06)
    assert "A+/A-" in found.note


def test_without_a_conflict_nothing_is_to_be_done():
    _, probe = large_probe(0.9)
    estimate = estimate_conflict(probe.gram, probe.num_samples, probe.num_correct, 8)
    found, floor = predictions(probe, {8: estimate}, SETTINGS)
    assert found.cosine.value == pytest.approx(estimate.cosine)
    assert found.kept.value == 1.0
    assert "nothing to do" in found.note
    assert floor.setting.startswith("floor = 0.00")
    assert "no floor is needed" in floor.note
    assert floor.kept.value == pytest.approx(1.0)


def test_without_a_signal_there_is_no_prediction():
    probe = draw(population(-0.5), 2, 16, torch.Generator().manual_seed(0))
    estimate = estimate_conflict(probe.gram, probe.num_samples, probe.num_correct, 8)
    for found in predictions(probe, {8: estimate}, SETTINGS):
        assert found.cosine.value is None
        assert found.kept.value is None
        assert "undetermined" in found.note


def test_the_harmless_ratio_and_its_error():
    """Against solve_floor's own, and against leaving each prompt out for real."""
    probe = draw(population(-0.5), 30, 16, torch.Generator().manual_seed(3))
    found = harmless_ratio(probe)
    assert found.value == pytest.approx(solve_floor([probe], 8).weight_ratio_bound)
    values = []
    for left_out in range(30):
        rest = torch.tensor([i for i in range(30) if i != left_out])
        rows = torch.cat([rest, rest + 30])
        small = ProbeGram(probe.gram[rows][:, rows], probe.num_samples[rest], probe.num_correct[rest])
        values.append(solve_floor([small], 8).weight_ratio_bound)
    assert found.standard_error == pytest.approx(jackknife_error(torch.tensor(values)), rel=1e-4)


def test_without_a_prompt_that_disagrees_there_is_no_ratio():
    sums = torch.tensor([[1.0], [1.0], [1.0], [-1.0], [-1.0], [-1.0]], dtype=torch.float64)
    probe = ProbeGram(sums @ sums.T, torch.full((3,), 4), torch.full((3,), 2))
    assert harmless_ratio(probe).value is None
