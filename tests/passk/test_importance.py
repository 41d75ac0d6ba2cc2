"""Importance weights against the enumeration of all possible samples, and against brute force."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passk_guard import GuardError, ProbeGram, estimate_conflict
from passk_guard.estimation.estimate import estimate_pooled
from passk_guard.estimation.evidence import conflict_check
from passk_guard.estimation.ustatistics import coefficients
from passk_guard.passk.closed_forms import passk_weight
from passk_guard.passk.importance import effective_share, miss_estimates

RIGHT = torch.tensor([True, False, False, True])
FEATURES = torch.tensor([[1.0, 0.2], [-0.4, 1.0], [0.3, -0.7], [0.5, 0.9]], dtype=torch.float64)


def policy(theta):
    return (FEATURES @ torch.tensor(theta, dtype=torch.float64)).softmax(0)


def gradients(draws, log_ratios, scores, ks):
    """[K, D, 2] g_k by the product's coefficients, of D prompts whose samples are the rows of `draws` [D, n]."""
    right, n = RIGHT[draws], torch.full((len(draws),), draws.shape[1])
    misses = miss_estimates(log_ratios[draws], ~right, n)
    probe = ProbeGram(torch.zeros(2 * len(n), 2 * len(n)), n, right.sum(1), misses=misses)
    positive, negative = coefficients(probe, ks).chunk(2, dim=1)
    weighted = log_ratios[draws].exp()[..., None] * scores[draws]
    plus, minus = (weighted * right[..., None]).sum(1), (weighted * ~right[..., None]).sum(1)
    return positive[..., None] * plus + negative[..., None] * minus


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_unbiased_for_the_present_policy_over_all_samples_of_the_earlier_one(n):
    then, now = policy([0.3, -0.5]), policy([-0.9, 0.8])
    scores = FEATURES - now @ FEATURES
    p, slope = now[RIGHT].sum(), (now[:, None] * scores)[RIGHT].sum(0)
    draws, ks = torch.tensor(list(itertools.product(range(4), repeat=n))), torch.arange(1, n + 1)
    found = (then[draws].prod(1)[:, None] * gradients(draws, (now / then).log(), scores, ks)).sum(1)
    expected = torch.stack([passk_weight(p, k) * slope for k in ks.tolist()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_ratios_of_one_give_todays_estimate_and_one_sided_prompts_nothing():
    c = torch.arange(9)
    n, wrong = torch.full_like(c, 8), torch.arange(8) >= c[:, None]
    misses = miss_estimates(torch.zeros(9, 8, dtype=torch.float64), wrong, n)
    ks = torch.arange(1, 9)
    fresh = ProbeGram(torch.zeros(18, 18), n, c)
    again = ProbeGram(torch.zeros(18, 18), n, c, misses=misses)
    torch.testing.assert_close(coefficients(again, ks), coefficients(fresh, ks), rtol=1e-12, atol=1e-13)
    wild = miss_estimates(torch.full((9, 8), 3.0, dtype=torch.float64), wrong, n)
    found = coefficients(ProbeGram(torch.zeros(18, 18), n, c, misses=wild), ks)
    assert found[:, 0].eq(0).all(), "no right sample"
    assert found[:, 17].eq(0).all(), "no wrong sample"


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(2, 64), st.floats(0.0, 20.0), st.integers(0, 10**6))
def test_elementary_symmetric_means_against_exact_products(n, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    logs = spread * (2 * torch.rand(1, n, generator=generator, dtype=torch.float64) - 1)
    wrong = torch.rand(1, n, generator=generator) < 0.7
    wrong[0, 0] = False
    exact = [Fraction(1)] + [Fraction(0)] * n
    for ratio in logs[wrong].exp().tolist():
        exact = exact[:1] + [exact[j] + exact[j - 1] * Fraction(ratio) for j in range(1, n + 1)]
    found = miss_estimates(logs, wrong, torch.tensor([n]))[0]
    assert not found.isnan().any()
    for j in range(1, n):
        mean = exact[j] / math.comb(n - 1, j)
        if mean < 10**300:
            assert float(found[j]) == pytest.approx(float(mean), rel=1e-10, abs=1e-300)
        else:
            assert float(found[j]) > 1e299


def test_prompts_of_different_sizes_and_ratios_beyond_float64():
    logs = torch.full((2, 64), 20.0, dtype=torch.float64)
    wrong = torch.ones(2, 64, dtype=torch.bool)
    wrong[:, 0], wrong[1, 4:] = False, False
    found = miss_estimates(logs, wrong, torch.tensor([64, 4]))
    assert torch.allclose(found[1, :4].log(), 20.0 * torch.arange(4, dtype=torch.float64))
    assert found[1, 4:].eq(0).all()
    assert torch.allclose(found[0, :30].log(), 20.0 * torch.arange(30, dtype=torch.float64))
    assert found[0, 63].isinf()


def test_effective_share():
    logs = torch.tensor([[0.0, 0, 0, 0], [0, 0, 9, 9], [-5, -5, -5, -5], [5, 5, 5, 5], [0, math.nan, 0, 0]])
    logs = torch.cat([logs, torch.tensor([[0, math.inf, 0, 0], [-math.inf] * 4])]).double()
    counted = torch.ones(7, 4, dtype=torch.bool)
    counted[1, 2:] = False
    one, part, left, crowded, *broken = effective_share(logs, counted).tolist()
    assert (one, part) == (1.0, 1.0)
    assert left == pytest.approx(math.exp(-5))
    assert crowded == pytest.approx(math.exp(-5))
    assert broken == [0.0, 0.0, 0.0]
    unequal = effective_share(torch.tensor([[0.0, math.log(3)]], dtype=torch.float64), torch.ones(1, 2).bool())
    assert float(unequal) == pytest.approx(16 / (2 * 10) / 2)


def probe(reused):
    generator = torch.Generator().manual_seed(0)
    sums = torch.randn(16, 9, generator=generator, dtype=torch.float64)
    c = torch.tensor([1, 2, 3, 4, 5, 6, 7, 3])
    wrong = torch.arange(8) >= c[:, None]
    logs = 0.3 * torch.randn(8, 8, generator=generator, dtype=torch.float64)
    misses = miss_estimates(logs, wrong, torch.full_like(c, 8)) if reused else None
    return ProbeGram(sums @ sums.T, torch.full_like(c, 8), c, misses=misses)


def test_fields_that_need_fresh_samples_are_left_out():
    old, new = probe(reused=True), probe(reused=False)
    estimate = estimate_pooled([new, old], 4)
    assert estimate.inner_product is not None
    for name in ("pass_at_1", "pass_at_1_se", "pass_at_k", "pass_at_k_se", "mean_weight", "weight_agreement_cov"):
        assert getattr(estimate, name) is None, name
    mixed, alone = estimate_pooled([old, new], 4), estimate_pooled([new], 4)
    assert mixed.pass_at_1 == alone.pass_at_1
    assert mixed.mean_weight == alone.mean_weight
    assert mixed.weight_agreement_cov == alone.weight_agreement_cov
    assert conflict_check(new, 4) is not None
    assert conflict_check(old, 4) is None


def test_arguments_that_need_fresh_samples_are_refused():
    old = probe(reused=True)
    with pytest.raises(GuardError, match="fresh samples for a floor"):
        coefficients(old, torch.tensor([4]), floor=torch.tensor([[0.5]]))
    with pytest.raises(GuardError, match="fresh samples for a floor"):
        coefficients(old, torch.tensor([4]), cap=2.0)
    assert estimate_conflict(old.gram, old.num_samples, old.num_correct, 4).pass_at_1 is not None
