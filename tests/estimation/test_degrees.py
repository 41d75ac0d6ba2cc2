"""Degrees of freedom of the variance of a contrast: against the formula in loops, and where it is in closed form."""

import pytest
import torch

from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.ustatistics import (
    Moments,
    coefficients,
    passk_rows,
    pooled_moments,
    prompt_kernel,
    refresh_moments,
)
from tests.helpers.populations import draw, population

ROWS = passk_rows(torch.tensor([8]))


def probe_of(m=16, seed=0):
    return draw(population(-0.3), m, 32, torch.Generator().manual_seed(seed))


def at(cosine):
    return torch.tensor([cosine], dtype=torch.float64)


def by_loops(probe, moments, cosine):
    """2 V^2 over the variance of V, a sum over prompts, with the kernel of the contrast."""
    m = probe.num_samples.numel()
    one, many = (coefficients(probe, torch.tensor([k]))[0] for k in (1, 8))
    norms = [float(x) for x in moments.value[0, 1:]]
    assert min(norms) > 0
    root = (norms[0] * norms[1]) ** 0.5
    kernel = (prompt_kernel(probe, many, one) + prompt_kernel(probe, one, many)) / 2
    kernel -= cosine * root / 2 * prompt_kernel(probe, one, one) / norms[0]
    kernel -= cosine * root / 2 * prompt_kernel(probe, many, many) / norms[1]
    kernel = kernel.tolist()
    others = [[y for y in range(m) if y != x] for x in range(m)]

    def mean(prompts):
        return sum(kernel[x][y] for x in prompts for y in prompts if x != y) / len(prompts) / (len(prompts) - 1)

    whole = mean(range(m))
    change = [mean(others[x]) - whole for x in range(m)]
    centre = sum(change) / m
    effect = [(m - 1) / (m - 2) * (sum(kernel[x][y] for y in others[x]) / (m - 1) - whole) for x in range(m)]
    left = [[kernel[x][y] - whole - effect[x] - effect[y] for y in others[x]] for x in range(m)]
    twice = (4 / (m * (m - 2)) - 2 / (m * (m - 1))) / (m * (m - 3))
    brings = [(m - 1) / m * (change[x] - centre) ** 2 - 2 * twice * sum(r * r for r in left[x]) for x in range(m)]
    slope = torch.tensor([1.0, -cosine * root / 2 / norms[0], -cosine * root / 2 / norms[1]], dtype=torch.float64)
    variance = float(slope @ moments.covariance[0] @ slope)
    spread = sum(b * b for b in brings) - sum(brings) ** 2 / m
    return min(m - 1.0, max(3.0, 2 * variance**2 / spread))


@pytest.mark.parametrize("cosine", [0.0, -0.3, 0.7])
def test_degrees_are_those_of_the_formula_in_loops(cosine):
    found = []
    for seed in range(3):
        probe = probe_of(m=24, seed=seed)
        moments = refresh_moments(probe, ROWS)
        degrees = float(moments.degrees_at(at(cosine))[0])
        assert degrees == pytest.approx(by_loops(probe, moments, cosine), rel=1e-9)
        found.append(degrees)
    assert max(found) > 3.5, "the formula and not its lower end"


def test_without_a_degenerate_part_they_are_those_of_the_kurtosis():
    influence = torch.randn(30, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value, nothing = influence.new_ones(2, 3), influence.new_zeros(30, 2, 3, 3)
    moments = Moments(value, influence, value, influence.square(), lambda: nothing)
    inner = influence[..., 0] - influence[..., 0].mean(0)
    kurtosis = inner.pow(4).mean(0) / inner.square().mean(0).square()
    assert torch.allclose(moments.degrees, (60 / (kurtosis - 1)).clamp(3, 29))
    assert torch.equal(moments.degrees, moments.degrees_at(value.new_zeros(2)))


def test_degrees_do_not_depend_on_units_or_on_a_norm_that_is_not_positive():
    probe = probe_of()
    moments = refresh_moments(probe, ROWS)
    for scale in (1e-40, 1e40):
        other = refresh_moments(ProbeGram(scale * probe.gram, probe.num_samples, probe.num_correct), ROWS)
        assert torch.allclose(other.degrees_at(at(-0.3)), moments.degrees_at(at(-0.3)))
    value = moments.value * torch.tensor([1.0, -1.0, 1.0])
    lost = Moments(value, moments.influence, moments.naive, moments.sizes, moments.find_overshoot)
    assert torch.equal(lost.degrees_at(at(-0.3)), moments.degrees)
    silent = refresh_moments(ProbeGram(0 * probe.gram, probe.num_samples, probe.num_correct), ROWS)
    assert float(silent.degrees[0]) == 15


def test_the_shares_of_a_prompt_met_twice_are_added():
    probes = [probe_of(m=6, seed=seed) for seed in (0, 1)]
    named = [
        ProbeGram(p.gram, p.num_samples, p.num_correct, list(names))
        for p, names in zip(probes, ("abcdef", "fedcba"), strict=True)
    ]
    alone, shared = pooled_moments(probes, ROWS), pooled_moments(named, ROWS)
    assert alone.overshoots.shape == (12, 1, 3, 3)
    assert torch.allclose(shared.overshoots, alone.overshoots[:6] + alone.overshoots[6:].flip(0))
    each = [refresh_moments(probe, ROWS).overshoots.sum(0) / 4 for probe in probes]
    assert torch.allclose(alone.overshoots.sum(0), each[0] + each[1])
