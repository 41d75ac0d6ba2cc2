"""The jackknife's overshoot against simulation, least squares and its own bounds."""

import torch

from passk_guard.estimation.ustatistics import jackknife_overshoot, without_overshoot


def pair_means(x, y):
    """(U, jackknife variance, kernel) of the mean of <x_i, y_j> over pairs of different prompts, by the formulas."""
    m = len(x)
    kernel = (x @ y.T + y @ x.T) / 2
    off = kernel - kernel.diagonal().diag()
    total = off.sum()
    without = (total - 2 * off.sum(1)) / ((m - 1) * (m - 2))
    return float(total / (m * (m - 1))), float((m - 1) / m * (without - without.mean()).square().sum()), kernel


def test_the_overshoot_is_the_excess_of_the_jackknife():
    generator = torch.Generator().manual_seed(0)
    for mean in (0.0, 0.3):  # all of the variance degenerate, and a part of it
        values, jackknives, overshoots = [], [], []
        for _ in range(1500):
            x, y = (mean + torch.randn(10, 4, dtype=torch.float64, generator=generator) for _ in range(2))
            value, jackknife, kernel = pair_means(x, y)
            values.append(value)
            jackknives.append(jackknife)
            overshoots.append(float(jackknife_overshoot(kernel[None]).sum()))
        variance = torch.tensor(values).var()
        jackknife, overshoot = (torch.tensor(v).mean() for v in (jackknives, overshoots))
        assert jackknife > 1.25 * variance
        assert abs((jackknife - overshoot) / variance - 1) < 0.12  # three standard errors of a variance of 1500


def test_a_kernel_that_is_a_sum_of_effects_has_no_degenerate_part():
    effect = torch.randn(7, dtype=torch.float64)
    kernel = (0.5 + effect[:, None] + effect[None, :]).fill_diagonal_(99.0)
    assert jackknife_overshoot(kernel[None]).abs().sum() < 1e-25


def test_residuals_are_those_of_least_squares():
    m, generator = 6, torch.Generator().manual_seed(1)
    kernels = torch.randn(2, m, m, dtype=torch.float64, generator=generator)
    kernels = kernels + kernels.mT
    pairs = torch.triu_indices(m, m, 1)
    design = torch.zeros(pairs.shape[1], m, dtype=torch.float64)
    design[torch.arange(len(design)), pairs[0]] = 1
    design[torch.arange(len(design)), pairs[1]] = 1
    values = kernels[:, pairs[0], pairs[1]].T
    rest = values - design @ torch.linalg.lstsq(design, values).solution
    zeta = rest.T @ rest / (m * (m - 3) / 2)
    expected = zeta * (4 / (m * (m - 2)) - 2 / (m * (m - 1)))
    assert torch.allclose(jackknife_overshoot(kernels).sum(0), expected)


def test_too_few_prompts_have_none():
    assert jackknife_overshoot(torch.ones(3, 3, 3)).abs().max() == 0


def test_no_direction_loses_more_than_half():
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(50, 3, 3, dtype=torch.float64, generator=generator)
    jackknife = root @ root.mT
    root = torch.randn(50, 3, 3, dtype=torch.float64, generator=generator)
    kept = without_overshoot(jackknife, root @ root.mT)
    for direction in torch.randn(40, 3, dtype=torch.float64, generator=generator):
        before, after = (torch.einsum("i,bij,j->b", direction, c, direction) for c in (jackknife, kept))
        assert bool((after >= 0.5 * before * (1 - 1e-9)).all())
        assert bool((after <= before * (1 + 1e-9)).all())
    small = 0.1 * jackknife
    assert torch.allclose(without_overshoot(jackknife, small), jackknife - small)


def test_a_covariance_of_lower_rank_and_one_of_zero():
    rank_one = torch.ones(3, 3, dtype=torch.float64)
    assert torch.allclose(without_overshoot(rank_one, 0.2 * rank_one), 0.8 * rank_one, atol=1e-9)
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    assert torch.equal(without_overshoot(nothing, nothing), nothing)


def test_statistics_of_very_different_size_keep_a_variance():
    """U_11 and U_kk may differ by many powers of ten: none of their variances may come out negative."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        root = torch.randn(3, 2, dtype=torch.float64, generator=generator)  # of rank 2, as with few prompts
        size = 10 ** torch.empty(3, dtype=torch.float64).uniform_(-12, 0, generator=generator)
        jackknife = root @ root.T * size[:, None] * size[None, :]
        kept = without_overshoot(jackknife, 0.9 * jackknife)
        assert bool((kept.diagonal() >= 0.5 * jackknife.diagonal() * (1 - 1e-9)).all())
