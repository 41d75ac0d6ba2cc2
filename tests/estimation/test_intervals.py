"""Bounds on a cosine: the quantile against tabulated values, and the bounds against the test they invert."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passk_guard import estimate_pooled
from passk_guard.estimation.intervals import cosine_bounds, student_t_quantile
from tests.helpers.populations import draw, population


@pytest.mark.parametrize(
    ("probability", "degrees", "value"),
    [
        (0.95, 5, 2.0150),
        (0.975, 5, 2.5706),
        (0.95, 10, 1.8125),
        (0.975, 30, 2.0423),
        (0.95, 191, 1.6529),
        (0.9, 4, 1.5332),
    ],
)
def test_quantile_of_students_t(probability, degrees, value):
    assert student_t_quantile(probability, degrees) == pytest.approx(value, rel=2e-3)
    assert student_t_quantile(1 - probability, degrees) == pytest.approx(-value, rel=2e-3)


def always(value):
    return lambda c: torch.full_like(c, value)


def narrower_at_the_ends(c):
    """A quantile that depends on the tested cosine, as degrees of freedom do."""
    return 3.2 - 1.3 * c.square()


def rejects(moments, covariance, quantile, c):
    """+1: c is too large, -1: too small, 0: not rejected."""
    a = float(moments[0])
    b = float((moments[1] * moments[2]).sqrt())
    slope = torch.tensor([1.0, -c * b / (2 * float(moments[1])), -c * b / (2 * float(moments[2]))]).double()
    error = float(slope @ covariance @ slope) ** 0.5
    z = (a - c * b) / error
    return 0 if abs(z) <= float(quantile(torch.tensor(c))) else (1 if z < 0 else -1)


@pytest.mark.parametrize("quantile", [always(1.9), narrower_at_the_ends], ids=["constant", "of c"])
@given(st.floats(-0.95, 0.95), st.floats(0.02, 0.6), st.integers(0, 10_000))
def test_bounds_invert_the_test(quantile, cosine, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    root = noise * torch.randn(3, 3, dtype=torch.float64, generator=generator)
    covariance = root @ root.T + 1e-4 * torch.eye(3, dtype=torch.float64)
    moments = torch.tensor([cosine, 1.0, 1.0], dtype=torch.float64)
    low, high = cosine_bounds(moments, covariance, quantile)
    assert -1 <= low <= high <= 1
    grid = torch.linspace(-1, 1, 401, dtype=torch.float64).tolist()
    verdicts = [rejects(moments, covariance, quantile, c) for c in grid]
    assert low <= cosine <= high
    first_too_large = next((c for c, v in zip(grid, verdicts, strict=True) if v > 0), 1.0)
    last_too_small = next((c for c, v in reversed(list(zip(grid, verdicts, strict=True))) if v < 0), -1.0)
    assert high == pytest.approx(first_too_large, abs=0.006)
    assert low == pytest.approx(last_too_small, abs=0.006)


def test_precise_norms_give_the_plain_interval():
    covariance = torch.diag(torch.tensor([0.01, 1e-12, 1e-12], dtype=torch.float64))
    low, high = cosine_bounds(torch.tensor([-0.3, 1.0, 1.0], dtype=torch.float64), covariance, always(2.0))
    assert (low, high) == pytest.approx((-0.5, -0.1), abs=1e-6)


def test_a_noisy_norm_does_not_hide_an_established_sign():
    covariance = torch.diag(torch.tensor([0.01, 4.0, 4.0], dtype=torch.float64))
    low, high = cosine_bounds(torch.tensor([-0.6, 1.0, 1.0], dtype=torch.float64), covariance, always(2.0))
    assert low == -1
    assert -0.6 < high < 0


def test_noise_everywhere_rules_nothing_out():
    covariance = 9 * torch.eye(3, dtype=torch.float64)
    assert cosine_bounds(torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64), covariance, always(2.0)) == (-1.0, 1.0)


@pytest.mark.parametrize(("cosine", "k"), [(0.97, 2), (-0.7, 8), (0.0, 8)])
def test_status_and_interval_are_one_rule(cosine, k):
    """Where the gradients are nearly parallel, degrees of the estimate used for every cosine left [-1, 1] and CLEAR."""
    generator, pop = torch.Generator().manual_seed(0), population(cosine, k=k)
    estimates = [
        estimate_pooled([draw(pop, 40, 16, generator) for _ in range(2)], k, curve=False, threshold=threshold)
        for _ in range(12)
        for threshold in (0.0, 0.3)
    ]
    for e in estimates:
        outside = e.cosine is not None and not e.ci_low <= e.threshold <= e.ci_high
        assert (e.status != "undetermined") == outside
        assert e.status == "undetermined" or (e.status == "conflict") == (e.ci_high < e.threshold)
    if cosine == 0.97:
        shown = [e for e in estimates if e.cosine is not None]
        assert len(shown) >= 20
        assert all(e.status == "clear" for e in shown)
        assert all(e.ci_low > 0.4 for e in shown)
