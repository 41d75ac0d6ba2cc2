"""Closed forms against enumeration: every subset, every outcome of a Bernoulli policy."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passk_guard import GuardError, pass_at_k, passk_advantages, passk_weight
from passk_guard.passk.closed_forms import sample_coefficients, unbiased_passk_weight

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "estimators.json").read_text())


@st.composite
def counts(draw, max_n=9):
    n = draw(st.integers(1, max_n))
    return n, draw(st.integers(0, n)), draw(st.integers(1, n))


def outcomes(n):
    return torch.tensor(list(itertools.product([0, 1], repeat=n)), dtype=torch.float64)


def chance(rows, p):
    return (p**rows * (1 - p) ** (1 - rows)).prod(1)


@given(counts())
def test_pass_at_k_is_the_share_of_subsets_with_a_hit(ncK):
    n, c, k = ncK
    samples = [1] * c + [0] * (n - c)
    subsets = list(itertools.combinations(samples, k))
    share = sum(any(s) for s in subsets) / len(subsets)
    assert math.isclose(float(pass_at_k(n, c, k)), share, abs_tol=1e-14)


@pytest.mark.parametrize("row", REFERENCE["pass_at_k"])
def test_pass_at_k_reference(row):
    assert math.isclose(float(pass_at_k(row["n"], row["c"], row["k"])), row["value"], rel_tol=1e-14)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(100_000, 1, 7), (100_000, 3, 50_000), (100_000, 40_000, 2), (99_999, 5, 99)]
)
def test_pass_at_k_keeps_its_digits_at_large_n(n, c, k):
    exact = 1 - math.comb(n - c, k) / math.comb(n, k) if k < 200 else None
    if exact is None or c < 10:  # exact rational arithmetic over the shorter product
        from fractions import Fraction

        miss = math.prod(Fraction(n - k - j, n - j) for j in range(c))
        exact = float(1 - miss)
    assert math.isclose(float(pass_at_k(n, c, k)), exact, rel_tol=1e-12)


def test_pass_at_k_broadcasts():
    n, c = torch.tensor([[8], [16]]), torch.tensor([0, 1, 8])
    values = pass_at_k(n, c, torch.tensor([1, 2, 4]))
    assert values.shape == (2, 3)
    assert float(values[1, 1]) == pytest.approx(float(pass_at_k(16, 1, 2)))


@given(counts())
def test_weight_estimate_is_unbiased(ncK):
    n, _, k = ncK
    rows = outcomes(n)
    for p in (0.0, 0.13, 0.5, 0.9):
        estimates = unbiased_passk_weight(torch.full((len(rows),), n), rows.sum(1), k)
        expected = float((chance(rows, p) * estimates).sum())
        assert math.isclose(expected, float(passk_weight(torch.tensor(p, dtype=torch.float64), k)), abs_tol=1e-11)


@given(counts(max_n=7), st.sampled_from([None, 0.3, 0.9]), st.sampled_from([None, 1.0, 2.5]))
def test_advantages_are_unbiased_for_weighted_gradient(ncK, floor, cap):
    """One-parameter policy with score y - p, for which grad p = p(1 - p); over all 2^n outcomes."""
    n, _, k = ncK
    rows = outcomes(n)
    for p in (0.07, 0.4, 0.8):
        advantages = passk_advantages(rows, k, floor=floor, cap=cap)
        gradient = (advantages * (rows - p)).mean(1)
        found = float((chance(rows, p) * gradient).sum())
        others = outcomes(n - 1) if n > 1 else torch.zeros(1, 0, dtype=torch.float64)
        seen = torch.tensor([math.comb(n - 1 - int(c), k - 1) / math.comb(n - 1, k - 1) for c in others.sum(1)])
        weight = (k * seen.double()).clamp(min=floor, max=cap) if floor or cap else k * seen.double()
        expected = float((chance(others, p) * weight).sum()) * p * (1 - p)
        if floor is None and cap is None:
            assert math.isclose(expected, k * (1 - p) ** (k - 1) * p * (1 - p), rel_tol=1e-6)
        assert math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-12)


@pytest.mark.parametrize("row", REFERENCE["bernoulli_policy_variance"]["rows"])
def test_advantages_reach_the_reference_target_with_no_more_variance_than_the_plain_transform(row):
    n, k, p = row["n"], row["k"], row["p"]
    rows = outcomes(n)
    gradient = (passk_advantages(rows, k) * (rows - p)).mean(1)
    mean = float((chance(rows, p) * gradient).sum())
    variance = float((chance(rows, p) * gradient**2).sum()) - mean**2
    assert mean == pytest.approx(row["target"], abs=1e-5)
    assert variance < row["var_s_loo"]


def test_k_1_is_rloo():
    correct = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    rloo = correct - (correct.sum(1, keepdim=True) - correct) / 3
    assert torch.allclose(passk_advantages(correct, 1), rloo)


def test_prompts_that_are_all_right_or_all_wrong_get_nothing():
    correct = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    for k in range(1, 5):
        assert not passk_advantages(correct, k).any()


def test_mask_lowers_n():
    correct = torch.tensor([[1, 0, 1, 0, 1]])
    mask = torch.tensor([[True, True, True, True, False]])
    assert torch.equal(passk_advantages(correct, 2, mask=mask)[:, :4], passk_advantages(correct[:, :4], 2))
    assert float(passk_advantages(correct, 2, mask=mask)[0, 4]) == 0
    assert not passk_advantages(correct, 2, mask=torch.zeros(1, 5, dtype=torch.bool)).any()


def test_coefficients_are_the_advantages_per_outcome():
    n, c = torch.tensor([6, 6, 6]), torch.tensor([1, 3, 5])
    positive, negative = sample_coefficients(n, c, 4)
    for x in range(3):
        row = torch.tensor([[1.0] * int(c[x]) + [0.0] * int(6 - c[x])], dtype=torch.float64)
        advantages = passk_advantages(row, 4)[0] / 6
        assert torch.allclose(advantages[0], positive[x])
        assert torch.allclose(advantages[-1], negative[x])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pass_at_k(4, 1, 8), "num_samples=4, k=8"),
        (lambda: pass_at_k(4, 5, 2), "num_correct"),
        (lambda: pass_at_k(4, 1, 0), "k=0"),
        (lambda: passk_advantages(torch.ones(2, 4), 5), "raise `num_samples` or lower `k`"),
        (lambda: passk_advantages(torch.full((2, 4), 0.5), 2), "0 and 1 only"),
        (lambda: passk_advantages(torch.ones(4), 2), "[prompts, samples]"),
        (lambda: passk_advantages(torch.ones(2, 4), 2, mask=torch.ones(2, 3)), "`mask` of shape (2, 4)"),
        (lambda: passk_advantages(torch.ones(2, 4), 2, floor=2.0, cap=1.0), "`floor` <= `cap`"),
    ],
)
def test_misuse_says_what_to_change(call, words):
    with pytest.raises(GuardError) as error:
        call()
    assert words in str(error.value)


@pytest.mark.parametrize(("k", "n"), [(1, 2), (1, 4), (2, 4), (2, 8), (3, 4)])
def test_completions_that_are_cut_off_and_have_no_verdict(k, n):
    """All outcomes of n samples with a verdict, right (0) or wrong (1) and not cut off (2), of one softmax.

    At k = 1 the gradient is that of the rate among them. At k > 1 there is more along grad log P(not cut off), since
    weight and baseline come from the same samples; it falls as 1/n.
    """
    logits = torch.tensor([0.3, -0.4, 0.6], dtype=torch.float64, requires_grad=True)
    rate = logits[:2].softmax(0)[0]
    (expected,) = torch.autograd.grad(1 - (1 - rate) ** k, logits)
    p, found, rate = logits.detach().softmax(0), torch.zeros(3, dtype=torch.float64), float(rate.detach())
    score = torch.eye(3, dtype=torch.float64) - p
    for right in range(n + 1):
        chance = math.comb(n, right) * rate**right * (1 - rate) ** (n - right)
        positive, negative = sample_coefficients(torch.tensor(n), torch.tensor(right), k)
        found += chance * (right * positive * score[0] + (n - right) * negative * score[1])
    (along,) = torch.autograd.grad(logits.softmax(0)[:2].sum().log(), logits)
    excess = (found - expected) @ along / (along @ along)
    torch.testing.assert_close(found - excess * along, expected)
    assert abs(float(excess)) < (1e-9 if k == 1 else 2 * k / n)
    assert k == 1 or float(excess) > 0.5 / n
