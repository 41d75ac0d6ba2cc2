"""Noise in parts and the power that follows: closed forms, and what then happens where the cosine is known."""

import dataclasses
import math
import time

import pytest
import torch

from benchmarks.calibration_populations import with_cosine
from benchmarks.planning import K, achieved_power, called_by, measured, predicted
from passk_guard.estimation.evidence import Check, RunEvidence
from passk_guard.estimation.power import (
    Look,
    average_noise,
    fewest_prompts,
    look_of,
    looks_until_called,
    measure_noise,
    power_of_one,
    signal_of,
)
from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.ustatistics import passk_rows, refresh_moments
from passk_guard.estimation.verdict import DecisionRule
from passk_guard.utils.errors import GuardError
from tests.helpers.populations import draw, population, true_moments

WHOLE_RUN = DecisionRule(false_alarms=0.05)


def noise_of(cosine, refreshes, *, m=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pop = population(cosine)
    return average_noise([measure_noise(draw(pop, m, 16, generator), 8) for _ in range(refreshes)])


def test_the_parts_at_the_same_size_are_the_variance_of_the_estimate():
    probe = draw(population(-0.3), 64, 16, torch.Generator().manual_seed(0))
    noise, moments = measure_noise(probe, 8), refresh_moments(probe, passk_rows(torch.tensor([8])))
    for i in range(3):
        slope = torch.eye(3, dtype=torch.float64)[i]
        exact = float(moments.jackknife[0, i, i] - moments.overshoots.sum(0)[0, i, i])
        assert noise.variance(slope, 64) == pytest.approx(exact)
        assert noise.error(i) == pytest.approx(math.sqrt(exact))


def test_the_parts_of_a_kernel_that_is_known():
    """<g(x), g(y)> of unit-variance Gaussians around a mean: zeta_1 = |mean|^2, zeta_2 = dim."""
    generator = torch.Generator().manual_seed(1)
    mean, dim, parts = 2.0, 6, []
    for _ in range(150):
        g = torch.randn(24, dim, dtype=torch.float64, generator=generator)
        g[:, 0] += mean
        sums = torch.cat([g, torch.zeros_like(g)])
        # With one of two samples right, g_1 = S+/2 - S-/2 = g/2.
        probe = ProbeGram(sums @ sums.T, torch.full((24,), 2), torch.full((24,), 1))
        parts.append(measure_noise(probe, 1))
    found = average_noise(parts)
    assert float(found.value[1]) == pytest.approx(mean**2 / 4, rel=0.1)
    assert float(found.linear[1, 1]) == pytest.approx(mean**2 / 16, rel=0.15)
    assert float(found.degenerate[1, 1]) == pytest.approx(dim / 16, rel=0.15)


@pytest.mark.parametrize("m", [32, 256])
def test_noise_at_one_size_gives_the_spread_at_another(m):
    generator = torch.Generator().manual_seed(2)
    pop, slope = population(-0.3), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    values = [
        float(refresh_moments(draw(pop, m, 16, generator), passk_rows(torch.tensor([8]))).value[0, 0])
        for _ in range(100)
    ]
    spread = torch.tensor(values).std()
    assert noise_of(-0.3, 50).variance(slope, m) ** 0.5 == pytest.approx(float(spread), rel=0.25)


def test_the_signal_is_the_populations():
    noise = noise_of(-0.3, 60)
    _, one, many = true_moments(population(-0.3), 8).tolist()
    found = signal_of(noise, 0.95)
    assert found.size == pytest.approx(math.sqrt(one * many), rel=4 * found.error)
    assert found.size < found.most


@pytest.mark.parametrize(("cosine", "m"), [(-0.2, 128), (-0.3, 64)])
def test_predicted_power_is_what_then_happens(cosine, m):
    generator, there = torch.Generator().manual_seed(3), with_cosine(cosine, K)
    powers, looks = predicted(measured(there, 60, generator), cosine, m)
    for refreshes in (1, 3):
        assert abs(powers[refreshes] - achieved_power(there, m, refreshes, 200, generator)) < 0.13
    assert called_by(there, m, looks, 40, generator) >= 0.8
    assert called_by(there, m, looks // 2, 40, generator) < 0.8


def test_looks_without_noise_are_counted_out():
    """Values that are all cut at their largest: the look is the one at which evidence of such values suffices."""
    evidence, count = RunEvidence(), 0
    while evidence.p_value > 0.05:
        evidence, count = evidence.with_check(Check(50.0, 1.0, 1e6)), count + 1
    assert looks_until_called(Look(50.0, 1e6), WHOLE_RUN, 0.9) == count
    for patience in (1, 4):
        assert looks_until_called(Look(50.0, 1e6), DecisionRule(patience=patience), 0.9) == patience


def test_looks_of_each_rule_against_a_loop():
    """Runs one by one, by `RunEvidence` and by counting; another generator and exact chi-squared numbers."""
    look, runs = Look(1.1, 40.0), 300
    generator = torch.Generator().manual_seed(5)
    first = []
    for _ in range(runs):
        evidence, count = RunEvidence(), 0
        while evidence.p_value > 0.05 and count < 60:
            z = torch.randn(41, dtype=torch.float64, generator=generator)
            check = Check(look.drift - float(z[0]), float(z[1:].square().mean()), look.degrees)
            evidence, count = evidence.with_check(check), count + 1
        first.append(count)
    expected = sorted(first)[math.ceil(0.9 * runs) - 1]
    assert abs(looks_until_called(look, WHOLE_RUN, 0.9) - expected) <= 2


def test_more_prompts_more_power():
    noise = noise_of(-0.1, 10)
    size = signal_of(noise, 0.95).size
    by_prompts = [look_of(noise, size, -0.2, m) for m in (32, 64, 128, 256)]
    for values in (
        [look.drift for look in by_prompts],
        [power_of_one(look, 3, 0.95) for look in by_prompts],
        [-looks_until_called(look, WHOLE_RUN, 0.9) for look in by_prompts],
    ):
        assert values == sorted(values)
    one, three = (fewest_prompts(noise, size, -0.2, 0.9, refreshes=r) for r in (1, 3))
    assert three < one < 4 * three
    for refreshes, m in ((1, one), (3, three)):
        assert power_of_one(look_of(noise, size, -0.2, m), refreshes, 0.95) >= 0.9
        assert power_of_one(look_of(noise, size, -0.2, m - 1), refreshes, 0.95) < 0.9


def test_a_threshold_moves_the_target():
    noise = noise_of(-0.1, 10)
    size = signal_of(noise, 0.95).size
    assert look_of(noise, size, -0.2, 64, -0.1).drift < look_of(noise, size, -0.2, 64).drift
    assert look_of(noise, size, -0.3, 64, -0.1).drift > look_of(noise, size, -0.2, 64, -0.1).drift


def test_out_of_reach():
    assert looks_until_called(Look(0.0, 60.0), WHOLE_RUN, 0.9) is None
    assert fewest_prompts(noise_of(-0.1, 4), 1e-12, -0.2, 0.9) is None


def test_no_signal_is_no_number():
    noise = noise_of(-0.2, 3)
    silent = dataclasses.replace(noise, value=noise.value * torch.tensor([1, 1, 0.01], dtype=torch.float64))
    found = signal_of(silent, 0.95)
    assert found.size is None
    assert found.most > 0


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_gradients_does_not_matter(scale):
    probe = draw(population(-0.3), 64, 16, torch.Generator().manual_seed(6))
    looks = []
    for factor in (1.0, scale):
        noise = measure_noise(dataclasses.replace(probe, gram=probe.gram * factor), 8)
        size = float((noise.value[1] * noise.value[2]).abs().sqrt())
        looks.append(look_of(noise, size, -0.2, 128, -0.1))
    assert looks[0].drift == pytest.approx(looks[1].drift)
    assert looks[0].degrees == pytest.approx(looks[1].degrees)


def test_no_noise_without_a_gradient_or_with_three_prompts():
    probe = draw(population(-0.3), 8, 16, torch.Generator().manual_seed(7))
    assert measure_noise(dataclasses.replace(probe, num_correct=probe.num_samples), 8) is None
    assert measure_noise(draw(population(-0.3), 3, 16, torch.Generator().manual_seed(7)), 8) is None
    with pytest.raises(GuardError, match="at least one refresh"):
        average_noise([])


def test_the_same_every_time_without_the_global_generator_and_fast():
    torch.manual_seed(0)
    before, began = torch.get_rng_state(), time.process_time()
    first, again = (looks_until_called(Look(0.4, 40.0), WHOLE_RUN, 0.9) for _ in range(2))
    assert first == again
    assert torch.equal(before, torch.get_rng_state())
    assert time.process_time() - began < 10
