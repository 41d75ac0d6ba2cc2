"""Numbers of the record against loops over pairs of real vectors."""

import math

import pytest
import torch

from passk_guard import estimate_conflict, passk_weight
from passk_guard.analysis.estimates import angle, gradient_row, image, jackknife_error, mean, wilson
from passk_guard.analysis.measure import kernel_from, measure_at, prompt_records
from passk_guard.analysis.results import Number
from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.ustatistics import prompt_kernel
from passk_guard.passk.closed_forms import sample_coefficients
from tests.helpers.populations import draw, population


@pytest.fixture(scope="module")
def vectors():
    """Score sums [2m, d] of seven prompts, two of them without a gradient, and what they give."""
    generator = torch.Generator().manual_seed(7)
    n, c = torch.tensor([8, 8, 8, 6, 8, 8, 8]), torch.tensor([1, 0, 7, 3, 8, 4, 2])
    sums = torch.randn(14, 5, dtype=torch.float64, generator=generator)
    sums[:7][c == 0] = sums[7:][c == 0] = sums[:7][c == n] = sums[7:][c == n] = 0.0
    return ProbeGram(sums @ sums.T, n, c, range(7)), sums


def gradients(probe, sums, k):
    plus, minus = sample_coefficients(probe.num_samples, probe.num_correct, k)
    return [plus[i] * sums[i] + minus[i] * sums[7 + i] for i in range(7)]


def test_prompt_records_against_loops(vectors):
    probe, sums = vectors
    places = [10, 11, 12, 13, 14, 15, 16]
    one, many = gradients(probe, sums, 1), gradients(probe, sums, 4)
    found = prompt_records(probe, 4, places, list("abcdefg"), 0.95)
    weighted = [sum(float(many[i] @ one[j]) for j in range(7) if j != i) / 6 for i in range(7)]
    against = -sum(w for w in weighted if w < 0)
    assert against > 0
    for i, record in enumerate(found):
        assert (record.place, record.text) == (places[i], "abcdefg"[i])
        if i in (1, 4):
            assert record.agreement.value is record.weighted_agreement.value is None
            assert record.hurts == []
            continue
        pairs = torch.tensor([float(one[i] @ one[j]) for j in range(7) if j != i])
        assert record.agreement.value == pytest.approx(float(pairs.mean()))
        assert record.agreement.standard_error == pytest.approx(float(pairs.std()) / math.sqrt(6))
        assert record.weighted_agreement.value == pytest.approx(weighted[i])
        assert record.share.value == pytest.approx(max(0.0, -weighted[i]) / against)
        hurt = sorted((float(many[i] @ one[j]), places[j]) for j in range(7) if j != i)
        assert [(place, pytest.approx(value)) for value, place in hurt if value < 0][:3] == record.hurts
    assert sum(record.share.value for record in found) == pytest.approx(1.0)


def test_weights_lie_in_the_interval_that_follows_from_p(vectors):
    probe, _ = vectors
    for record in prompt_records(probe, 4, range(7), list("abcdefg"), 0.95):
        assert record.pass_rate.low <= record.pass_rate.value <= record.pass_rate.high
        assert record.weight.low <= record.weight.value <= record.weight.high
        assert record.weight.high >= float(passk_weight(torch.tensor(record.pass_rate.low), 4)) - 1e-6


def test_the_kernel_runs_from_easy_to_hard_without_a_diagonal(vectors):
    probe, sums = vectors
    one = gradients(probe, sums, 1)
    kernel = kernel_from(probe, [10, 11, 12, 13, 14, 15, 16])
    order = [2, 3, 5, 6, 0]  # p-hat 7/8, 3/6, 4/8, 2/8, 1/8
    assert kernel.places == [10 + i for i in order]
    assert [len(row) for row in kernel.below] == [0, 1, 2, 3, 4]
    values = []
    for i, row in enumerate(kernel.below):
        for j, value in enumerate(row):
            values.append(float(one[order[i]] @ one[order[j]]))
            assert value == pytest.approx(values[-1], rel=1e-3)
    assert kernel.negative_pairs.value == pytest.approx(sum(v < 0 for v in values) / 10)


def test_the_share_of_negative_pairs_has_the_jackknifes_error(vectors):
    probe, _ = vectors
    whole = kernel_from(probe, list(range(7)))
    kept = [i for i in range(7) if i not in (1, 4)]
    shares = []
    for left_out in kept:
        rest = torch.tensor([i for i in kept if i != left_out])
        rows = torch.cat([rest, rest + 7])
        small = ProbeGram(probe.gram[rows][:, rows], probe.num_samples[rest], probe.num_correct[rest])
        shares.append(kernel_from(small, rest.tolist()).negative_pairs.value)
    assert whole.negative_pairs.standard_error == pytest.approx(jackknife_error(torch.tensor(shares)), abs=1e-6)


def test_the_angle_of_g_k_and_g_1_is_the_estimators():
    probe = draw(population(-0.5), 60, 16, torch.Generator().manual_seed(1))
    expected = estimate_conflict(probe.gram, probe.num_samples, probe.num_correct, 8)
    found = angle(probe, gradient_row(probe, 8), gradient_row(probe, 1), 0.95)
    assert found.value == pytest.approx(expected.cosine)
    assert found.standard_error == pytest.approx(expected.standard_error)
    assert (found.low, found.high) == pytest.approx((expected.ci_low, expected.ci_high))


def test_rates_and_weights_cover_the_truth():
    """90% intervals of E[pass@4] and E[w_4] over fresh probes."""
    pop = population(-0.3)
    truth = float((pop.share * (1 - (1 - pop.pass_rate) ** 4)).sum())
    weight = float((pop.share * passk_weight(pop.pass_rate, 4)).sum())
    generator, hits = torch.Generator().manual_seed(2), [0, 0]
    for _ in range(200):
        at = measure_at(draw(pop, 48, 8, generator), 4, estimate_conflict_stub(), 0.9)
        hits[0] += at.pass_rate.low <= truth <= at.pass_rate.high
        hits[1] += at.mean_weight.low <= weight <= at.mean_weight.high
    assert all(170 <= hit <= 193 for hit in hits), hits


def estimate_conflict_stub():
    probe = draw(population(-0.3), 8, 8, torch.Generator().manual_seed(0))
    return estimate_conflict(probe.gram, probe.num_samples, probe.num_correct, 4)


def test_intervals_by_themselves():
    assert wilson(0, 10, 0.95).high == pytest.approx(0.2775, abs=1e-4)  # Wilson 1927, tabulated
    assert wilson(5, 10, 0.95).low == pytest.approx(0.2366, abs=1e-4)
    assert (wilson(0, 10, 0.95).low, wilson(10, 10, 0.95).high) == (0.0, 1.0)
    assert mean(torch.ones(5), 0.95, torch.arange(5)) == Number(1.0)
    wide = mean(torch.tensor([0.0, 1.0]), 0.95, torch.arange(2), low=0.0, high=1.0)
    assert (wide.low, wide.high) == (0.0, 1.0)
    bent = image(lambda x: x * x, Number(1.0, None, -2.0, 3.0))
    assert (bent.value, bent.low, bent.high) == (1.0, pytest.approx(0.0, abs=1e-3), 9.0)
    assert image(abs, Number()) == Number()


def test_a_kernel_is_its_vectors(vectors):
    probe, sums = vectors
    left, right = gradients(probe, sums, 3), gradients(probe, sums, 1)
    expected = torch.stack(left) @ torch.stack(right).T
    assert torch.allclose(prompt_kernel(probe, gradient_row(probe, 3), gradient_row(probe, 1)), expected)


def test_a_prompt_is_not_among_those_it_hurts():
    """One dimension, and S- of the first prompt between the two ratios at which g_1 and g_k turn their sign."""
    n, c = torch.tensor([8, 8, 8]), torch.tensor([2, 4, 4])
    many, one = (sample_coefficients(n, c, k) for k in (4, 1))
    between = (float(many[0][0] / -many[1][0]) + float(one[0][0] / -one[1][0])) / 2
    sums = torch.tensor([1.0, 0.5, -0.5, between, -0.5, 0.5], dtype=torch.float64)[:, None]
    probe = ProbeGram(sums @ sums.T, n, c, range(3))
    assert float(prompt_kernel(probe, torch.cat(many), torch.cat(one))[0, 0]) < 0
    first = prompt_records(probe, 4, range(3), list("abc"), 0.95)[0]
    assert 0 not in [place for place, _ in first.hurts]
    assert first.hurts
