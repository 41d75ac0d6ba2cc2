"""The projection at any scale: the constraint holds and the change is small, or the gradient stays unchanged."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from passk_guard import FailedRefresh, GuardError, combine, project_gradient
from passk_guard.mitigation import plan_projection
from tests.fuzz.strategies import JSON_VALUE, NUMBER, SCALAR

SCALE = st.sampled_from([0.0, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e30])
ODD = st.sampled_from([math.nan, math.inf, -math.inf, 1e38, 0.0])
DTYPE = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


@st.composite
def vectors(draw):
    """The same shapes twice: a gradient and a protected direction, each at its own scale."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 200)))
    shapes = draw(st.lists(st.sampled_from([(), (0,), (3,), (2, 5), (1, 1)]), max_size=4))
    dtype = draw(DTYPE)
    parts = [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(2)]
    lean = draw(st.sampled_from([0.0, 1.0, -1.0, -1000.0]))
    g = [(a + lean * b) * draw(SCALE) for a, b in zip(*parts, strict=True)]
    p = [b * draw(SCALE) for b in parts[1]]
    return [x.to(dtype) for x in g], [x.to(dtype) for x in p]


def flat(parts):
    return torch.cat([part.double().flatten() for part in parts]) if parts else torch.zeros(0, dtype=torch.float64)


@given(vectors(), st.sampled_from([0.0, 0.1, 0.2, 0.9]))
def test_any_two_vectors(pair, gamma):
    grads, protected = pair
    g, p = flat(grads), flat(protected)
    kept = [part.clone() for part in protected]
    result = project_gradient(grads, protected, gamma)
    after = flat(grads)
    assert all(torch.equal(a, b) for a, b in zip(kept, protected, strict=True))
    if result.coefficient == 0.0:
        assert torch.equal(after, g)
        return
    assert result.reason is None
    assert bool(after.isfinite().all())
    eps = torch.finfo(grads[0].dtype).eps if grads else 0
    room = 16 * eps * float(g.norm() * p.norm())
    assert float(after @ p) >= gamma * float(g.norm() * p.norm()) - room - 1e-300
    change = after - g
    assert float(change.norm()) <= (1 + gamma) * float(g.norm()) * (1 + 16 * eps) + 16 * eps * float(after.norm())


@given(vectors(), st.integers(0, 30), ODD, st.booleans())
def test_numbers_that_are_not_finite(pair, place, value, in_gradient):
    grads, protected = pair
    spoilt = [part for part in (grads if in_gradient else protected) if part.numel()]
    if not spoilt:
        return
    part = spoilt[place % len(spoilt)]
    part.view(-1)[place % part.numel()] = value
    before = [x.clone() for x in grads]
    result = project_gradient(grads, protected)
    if not bool(flat(before).isfinite().all() and flat(protected).isfinite().all()):
        assert result.reason
        assert all(torch.equal(a, b) or bool(b.isnan().any()) for a, b in zip(before, grads, strict=True))
    assert bool(flat(before).isfinite().all()) <= bool(flat(grads).isfinite().all())


@given(NUMBER, NUMBER, NUMBER, st.one_of(st.floats(0, 0.99), NUMBER, SCALAR))
@example(10**400, 1.0, 1.0, 0.2)
@example(-1e308, 1e308, 1e308, 0.2)
@example(-5e-324, 5e-324, 5e-324, 0.2)
def test_any_three_numbers(inner, norm_g_sq, norm_p_sq, gamma):
    try:
        plan = plan_projection(inner, norm_g_sq, norm_p_sq, gamma)
    except GuardError:
        return
    assert 0 <= gamma < 1
    assert math.isfinite(plan.coefficient)
    assert plan.coefficient >= 0
    assert plan.reason is None or plan.coefficient == 0
    if plan.cosine_after is not None:
        assert -1 <= plan.cosine_before <= 1
        assert -1 <= plan.cosine_after <= 1 + 1e-12


LISTS = st.one_of(
    st.lists(st.one_of(SCALAR, st.just(torch.ones(2)), st.just(torch.ones(2, dtype=torch.int64))), max_size=3),
    JSON_VALUE,
)


@given(LISTS, LISTS)
@example([torch.ones(2, dtype=torch.int64)], [-torch.ones(2)])
def test_inputs_that_are_no_gradients(grads, protected):
    try:
        project_gradient(grads, protected)
    except GuardError:
        return
    assert all(isinstance(part, torch.Tensor) and part.is_floating_point() for part in (*grads, *protected))


FLOATS = NUMBER.filter(lambda v: not isinstance(v, int) or abs(v) < 2**63).map(float)
GRAMIANS = st.one_of(
    st.lists(FLOATS, min_size=4, max_size=4).map(lambda values: torch.tensor(values, dtype=torch.float64).view(2, 2)),
    SCALAR,
    st.sampled_from([torch.zeros(2, 2), torch.eye(3), torch.full((2, 2), math.nan), torch.eye(2).to(torch.complex64)]),
)
METHODS = st.one_of(st.sampled_from(["mgda", "imtl-g", "aligned-mtl", "pcd", "pcgrad", "nothing"]), SCALAR)


@given(GRAMIANS, METHODS)
@example(torch.tensor([[1e308, 0.0], [0.0, 1e308]], dtype=torch.float64), "mgda")
@example(torch.tensor([[1.0, 9.0], [9.0, 1.0]], dtype=torch.float64), "mgda")
def test_any_two_objectives(gramian, method):
    try:
        weights = combine(gramian, method)
    except (GuardError, FailedRefresh):
        return
    assert weights.shape == (2,)
    assert bool(weights.isfinite().all())
    g, p = gramian[0, 0].sqrt(), gramian[1, 1].sqrt()
    assert abs(float(gramian[0, 1] / g / p)) <= 1.01


def test_a_users_weighting_that_returns_no_weights():
    for wrong in (lambda matrix: [1.0, 0.0], lambda matrix: torch.ones(3), lambda matrix: None):
        with pytest.raises((GuardError, FailedRefresh)):
            combine(torch.eye(2), wrong)
