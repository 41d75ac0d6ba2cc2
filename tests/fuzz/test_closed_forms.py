"""Closed forms at extreme n and k against exact rational arithmetic, and odd arguments."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from passk_guard import (
    FailedRefresh,
    GuardError,
    named_weighting,
    pass_at_k,
    passk_advantages,
    passk_weight,
)
from passk_guard.passk.closed_forms import sample_coefficients, unbiased_passk_weight
from tests.fuzz.strategies import NUMBER, ODD_TEXT, SCALAR

TOLERANCE = 1e-9


@st.composite
def extreme_counts(draw, most=100_000):
    n = draw(st.one_of(st.integers(1, 40), st.integers(1, most), st.sampled_from([1, 2, most])))
    ends = st.sampled_from([0, 1, 2, n - 1, n]).map(lambda v: min(max(v, 0), n))
    c = draw(st.one_of(ends, st.integers(0, n)))
    k = draw(st.one_of(ends.map(lambda v: max(v, 1)), st.integers(1, min(n, 32)), st.integers(1, n)))
    return n, c, k


def miss(n, c, k):
    """C(n-c, k) / C(n, k), exactly."""
    few, many = min(c, k), max(c, k)
    if n - c < k:
        return Fraction(0)
    if few <= 300:
        top = bottom = 1
        for j in range(few):
            top, bottom = top * (n - many - j), bottom * (n - j)
        return Fraction(top, bottom)
    return None  # thousands of digits: covered by the symmetric and the smaller cases


def close(found, exact):
    return exact is None or math.isclose(float(found), float(exact), rel_tol=TOLERANCE, abs_tol=1e-300)


@given(extreme_counts())
@example((100_000, 50_000, 50_000))
@example((100_000, 99_999, 1))
@example((100_000, 1, 100_000))
def test_against_rational_arithmetic(counts):
    n, c, k = counts
    chance = miss(n, c, k)
    rate = pass_at_k(n, c, k)
    assert 0 <= float(rate) <= 1
    assert close(rate, None if chance is None else 1 - chance)
    weight = unbiased_passk_weight(torch.tensor(n), torch.tensor(c), k)
    seen = miss(n, c, k - 1)
    assert 0 <= float(weight) <= k
    assert close(weight, None if seen is None else k * seen)
    positive, negative = (float(x) for x in sample_coefficients(torch.tensor(n), torch.tensor(c), k))
    assert positive >= 0 >= negative
    others = max(n - 1, 1)
    if c > 0 and (seen := miss(n - 1, c - 1, k - 1)) is not None:
        assert close(positive, k * seen * (1 - Fraction(c - 1, others)) / n)
    if n - c > 0 and n > 1 and (seen := miss(n - 1, c, min(k - 1, n - 1))) is not None:
        assert close(negative, -k * seen * Fraction(c, others) / n)
    assert c > 0 or (positive, negative) == (0.0, 0.0) or negative == 0
    assert c < n or negative == 0


@given(st.lists(st.tuples(extreme_counts(2000)), min_size=1, max_size=4))
def test_many_at_once_are_each_alone(rows):
    n, c, k = (torch.tensor([row[0][i] for row in rows]) for i in range(3))
    together = pass_at_k(n, c, k)
    assert together.tolist() == pytest.approx([float(pass_at_k(*row[0])) for row in rows], rel=1e-12)


SMALL = st.one_of(st.integers(-3, 12), st.sampled_from([0.5, 8.0, math.nan, math.inf, -math.inf]))
COUNT = st.one_of(SMALL, ODD_TEXT, st.none(), st.booleans(), st.lists(SMALL, max_size=3).map(torch.tensor))


def whole(value):
    """Whether this is a count, or a tensor of counts."""
    flat = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    return all(math.isfinite(v) and v == int(v) for v in flat)


@given(COUNT, COUNT, COUNT)
@example(3.7, 1, 1)
@example(8, 2, 1.5)
@example(torch.ones(2, dtype=torch.complex64), 1, 1)
@example(torch.ones(2), torch.ones(3), 1)
def test_any_count(n, c, k):
    try:
        found = pass_at_k(n, c, k)
    except GuardError:
        return
    assert whole(n)
    assert whole(c)
    assert whole(k)
    assert bool(((found >= 0) & (found <= 1)).all())


@given(st.one_of(st.floats(), NUMBER), st.one_of(st.floats(), NUMBER))
@example(1 + 1e-9, 2.5)
@example(-1e-9, 2.5)
@example(0.5, math.nan)
def test_any_rate(p, k):
    try:
        rate = torch.tensor(float(p), dtype=torch.float64)
        weight = float(passk_weight(rate, float(k)))
    except (GuardError, OverflowError):
        return
    assert -1e-5 <= float(p) <= 1 + 1e-5
    assert 0 <= weight <= float(k)


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, 0.5, math.nan, math.inf, -1.0]), min_size=3, max_size=3), max_size=3),
    st.one_of(st.integers(-1, 5), NUMBER),
    st.one_of(st.none(), NUMBER),
    st.one_of(st.none(), NUMBER),
)
def test_any_batch(rows, k, floor, cap):
    correct = torch.tensor(rows) if rows else torch.zeros(0, 3)
    try:
        advantages = passk_advantages(correct, k, floor=floor, cap=cap)
    except GuardError:
        return
    assert bool(((correct == 0) | (correct == 1)).all())
    assert not bool(advantages.isnan().any())
    assert bool((advantages[correct == 1] >= 0).all())
    assert bool((advantages[correct == 0] <= 0).all())


@given(st.one_of(st.just("1.0"), st.just([[1.0]]), st.none(), st.just(torch.zeros(2, 2, dtype=torch.complex64))))
def test_what_is_no_batch(correct):
    with pytest.raises(GuardError, match="correct"):
        passk_advantages(correct, 1)


SPEC = st.one_of(
    ODD_TEXT,
    st.text(max_size=12),
    SCALAR,
    st.builds(
        "{}{}{}{}".format,
        st.sampled_from(["grpo", "dr_grpo", "rloo", "maxrl", "passk", "passk_training", "rs_grpo", "nothing"]),
        st.sampled_from(["", ":", "::"]),
        st.sampled_from(["", "8", "k=8", "beta=2", "epsilon=0", "k=nan", "beta=inf", "beta=1e-320", "k=" + "9" * 5000]),
        st.sampled_from(["", ",floor=0.5", ",floor=-1", ",cap=nan", ",k=3", ",=", ","]),
    ),
)


@given(SPEC, st.integers(1, 24), st.one_of(st.floats(0, 1), st.floats()))
def test_any_name_of_an_objective(spec, n, p):
    try:
        weighting = named_weighting(spec)
        c = torch.arange(n + 1)
        coefficients = weighting.coefficients(torch.full((n + 1,), n), c)
        weight = weighting.effective_weight(torch.tensor(p, dtype=torch.float64), n)
    except (GuardError, FailedRefresh):
        return
    assert 0 <= p <= 1
    assert bool(weight.isfinite())
    assert all(bool(values.isfinite().all()) for values in coefficients)
