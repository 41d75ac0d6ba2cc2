"""How much of the protected direction is noise: against loops, closed forms and populations with a known gradient."""

from types import SimpleNamespace

import pytest
import torch

from passk_guard import ProbeGram
from passk_guard.mitigation.protected_direction import DirectionNoise, direction_noise
from passk_guard.passk.closed_forms import sample_coefficients
from tests.helpers.populations import draw, population, true_moments
from tests.mitigation.test_gradient_guard import Engine, guard


def refresh_of(probe):
    return SimpleNamespace(probe=probe, num_samples=probe.num_samples, fewest=1)


def null_population():
    """Scores of mean zero, so that grad J_1 is zero."""
    pop = population(-0.3, spread=1.0)
    pop.means = torch.zeros_like(pop.means)
    return pop


@pytest.mark.parametrize("left_out", [False, True])
def test_pairs_of_different_prompts_in_a_loop(left_out):
    generator, m, fewest = torch.Generator().manual_seed(0), 9, 4
    sums = torch.randn(2 * m, 5, generator=generator, dtype=torch.float64)
    samples = torch.full((m,), 8)
    samples[2] = 3 if left_out else 8  # too few verdicts: not in the Gram matrix
    right = torch.randint(1, 3, (m,), generator=generator)
    kept = (samples >= fewest).nonzero().squeeze(1)
    rows = torch.cat([kept, kept + m])
    steering = torch.arange(m) % 4 != 3 if left_out else None
    probe = ProbeGram(sums[rows] @ sums[rows].T, samples[kept], right[kept])
    found = direction_noise(SimpleNamespace(probe=probe, num_samples=samples, fewest=fewest), steering)
    positive, negative = sample_coefficients(samples, right, 1)
    each = (positive[:, None] * sums[:m] + negative[:, None] * sums[m:])[
        kept if steering is None else kept[steering[kept]]
    ]
    s, norm_sq = len(each), float(each.mean(0) @ each.mean(0))
    pairs = [float(each[i] @ each[j]) for i in range(s) for j in range(s) if i != j]
    assert found.squared == pytest.approx(1 - sum(pairs) / len(pairs) / norm_sq)
    assert found.spread == pytest.approx((2 * sum(x * x for x in pairs)) ** 0.5 / len(pairs) / norm_sq)


def test_what_is_no_noise_is_the_true_gradient_and_zero_is_seldom_taken_for_one():
    generator, pop, zero = torch.Generator().manual_seed(1), population(-0.3), null_population()
    signals, established = [], 0
    for _ in range(400):
        probe = draw(pop, 24, 8, generator)
        positive, negative = sample_coefficients(probe.num_samples, probe.num_correct, 1)
        row = torch.cat([positive, negative])
        signals.append((1 - direction_noise(refresh_of(probe)).squared) * float(row @ probe.gram @ row) / 24**2)
        noise = direction_noise(refresh_of(draw(zero, 24, 8, generator)))
        established += 1 - noise.squared > 1.645 * noise.spread
    signals = torch.tensor(signals)
    assert abs(float(signals.mean() - true_moments(pop, 8)[1])) < 3 * float(signals.std()) / 20
    assert 0.02 < established / 400 < 0.09, "5% asked for"


@pytest.mark.parametrize("same_samples", [False, True])
def test_the_noise_of_an_average(same_samples):
    """q + e, averaged three times: fresh noise shrinks, that of the same samples stays."""
    generator, dim, runs = torch.Generator().manual_seed(2), 400, 200
    errors, reliabilities = [], []
    for _ in range(runs):
        made = guard(Engine([0.0] * dim), average=0.5)
        q = torch.zeros(dim)
        q[0] = 1.0
        e = torch.randn(dim, generator=generator) / dim**0.5
        for _ in range(3):
            p = q + e
            share = DirectionNoise(1 - 1 / float(p @ p), 0.1)  # U_11 is |q|^2 = 1
            made.harvest(None, [p.tolist()], share, same_samples=same_samples)
            if not same_samples:
                e = torch.randn(dim, generator=generator) / dim**0.5
        error = made.protected[0] - q
        errors.append(float(error @ error))
        reliabilities.append(made.reliability)
    expected = 1.0 if same_samples else 0.5**4 + 0.25**2 + 0.5**2
    assert sum(errors) / runs == pytest.approx(expected, rel=0.03)
    assert sum(reliabilities) / runs == pytest.approx(1 / (1 + expected), abs=0.03)


def test_noise_is_told_once_and_changes_no_step(tmp_path):
    told = []
    for noise in (None, DirectionNoise(0.6, 0.01), DirectionNoise(0.98, 0.4)):
        engine, said = Engine([1.0, -2.0]), []
        made = guard(engine, said)
        for _ in range(2):
            made.harvest(None, [[0.0, 3.0]], *([] if noise is None else [noise]))
        assert made.reliability == pytest.approx(1 - (noise.squared if noise else 0))
        made.save(tmp_path)
        again = guard(Engine([1.0, -2.0]))
        assert again.load(tmp_path) is None
        assert again.reliability == made.reliability
        engine.before_step()
        told.append((said, engine.parts[0].tolist()))
    (nothing, step), (low, low_step), (none, none_step) = told
    assert nothing == []
    assert [line.split(":")[0] for line in low] == [
        "the protected direction is pass@1's gradient by 40% and noise otherwise"
    ]
    assert [line.split(":")[0] for line in none] == [
        "no pass@1 gradient is established, so that steps may be held to noise"
    ]
    assert step == low_step == none_step != [1.0, -2.0]
