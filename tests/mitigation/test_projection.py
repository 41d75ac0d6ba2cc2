"""The projection against quadratic programs solved by search, and what its docstring promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passk_guard.mitigation import plan_held, plan_projection, project_gradient, projection_coefficient
from passk_guard.utils.errors import GuardError

GAMMAS = (0.0, 0.2, 0.7)
cosines = st.floats(-0.999, 0.999)
gammas = st.floats(0.0, 0.95)
scales = st.floats(-10, 15).map(lambda power: 10.0**power)


def pair(cosine, norm_g=1.0, norm_p=1.0):
    """g and p in the plane with this cosine and these norms."""
    g = torch.tensor([cosine, math.sqrt(1 - cosine**2)], dtype=torch.float64) * norm_g
    return g, torch.tensor([norm_p, 0.0], dtype=torch.float64)


def projected(g, p, gamma):
    return g + projection_coefficient(float(g @ p), float(g @ g), float(p @ p), gamma) * p


def nearest_by_search(g, allowed, steps=801):
    """The point of a fine grid around g that is allowed and nearest to g."""
    axis = torch.linspace(-2, 2, steps, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    grid = grid[allowed(grid)]
    return grid[(grid - g).norm(dim=1).argmin()]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("cosine", [-0.95, -0.5, -0.1, 0.1, 0.5, 0.9])
def test_it_is_the_smallest_change_with_the_gain_asked_for(cosine, gamma):
    g, p = pair(cosine)
    bound = gamma * g.norm() * p.norm()
    change = float((projected(g, p, gamma) - g).norm())
    best = float((nearest_by_search(g, lambda grid: grid @ p >= bound) - g).norm())
    assert best - 0.006 <= change <= best + 1e-9, "the grid's spacing is 0.005"


@given(cosines, gammas, scales, scales)
def test_the_bound_holds_and_only_along_p(cosine, gamma, norm_g, norm_p):
    g, p = pair(cosine, norm_g, norm_p)
    after = projected(g, p, gamma)
    bound = gamma * float(g.norm() * p.norm())
    assert float(after @ p) >= bound - 1e-12 * norm_g * norm_p
    assert after[1] == g[1], "what is orthogonal to p stays"
    if cosine > gamma + 1e-9:
        assert torch.equal(after, g), "no conflict: the identity"
    elif cosine < gamma - 1e-9:
        assert float(after @ p) == pytest.approx(bound, rel=1e-9, abs=1e-12 * norm_g * norm_p)


@given(cosines, gammas)
def test_the_cosine_afterwards_is_what_the_docstring_says(cosine, gamma):
    g, p = pair(cosine)
    after = projected(g, p, gamma)
    plan = plan_projection(float(g @ p), 1.0, 1.0, gamma)
    found = float(after @ p / after.norm() / p.norm())
    assert plan.cosine_before == pytest.approx(cosine, abs=1e-12)
    assert plan.cosine_after == pytest.approx(found, abs=1e-9)
    assert plan.norm_after == pytest.approx(float(after.norm()), rel=1e-9)
    assert found >= min(cosine, gamma) - 1e-12
    if cosine < gamma:
        assert found >= gamma / math.sqrt(1 + gamma**2) - 1e-12
    if cosine <= -gamma:
        assert found >= gamma - 1e-12
    assert plan.norm_after >= gamma * (1 - 1e-12)


@given(cosines, st.just(0.0) | st.floats(1e-3, 5), scales, scales)
def test_held_it_adds_lambda_of_the_gradients_length_along_p(cosine, multiplier, norm_g, norm_p):
    g, p = pair(cosine, norm_g, norm_p)
    plan = plan_held(float(g @ p), float(g @ g), float(p @ p), multiplier)
    after, longest = plan.keeps * g + plan.coefficient * p, max(1, multiplier)
    added = float((after - g / longest).norm())
    assert added == pytest.approx(multiplier / longest * norm_g, rel=1e-6, abs=1e-12 * norm_g)
    assert plan.norm_after == pytest.approx(float(after.norm()), rel=1e-6, abs=1e-6 * norm_g)
    assert (plan.coefficient == 0) == (multiplier == 0)
    if 0 <= cosine + multiplier < 1 and multiplier:
        found = projection_coefficient(float(g @ p), float(g @ g), float(p @ p), cosine + multiplier)
        assert plan.coefficient == pytest.approx(found / longest, rel=1e-6)
    with pytest.raises(GuardError, match="multiplier"):
        plan_held(1.0, 1.0, 1.0, -0.1)


@given(cosines, st.sampled_from(GAMMAS))
def test_twice_is_once(cosine, gamma):
    g, p = pair(cosine)
    once = projected(g, p, gamma)
    bound = gamma * float(g.norm() * p.norm())  # the original length: the bound does not move
    assert max(0.0, bound - float(once @ p)) <= 1e-12


def test_gamma_zero_is_the_one_sided_pcgrad_step():
    g, p = pair(-0.6, 2.0, 3.0)
    assert float(projected(g, p, 0.0) @ p) == pytest.approx(0.0, abs=1e-12)
    g, p = pair(-1.0)
    plan = plan_projection(-1.0, 1.0, 1.0, 0.0)
    assert (plan.coefficient, plan.norm_after, plan.cosine_after) == (1.0, 0.0, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(3))
def test_what_is_not_finite_changes_nothing(bad, place):
    numbers = [-0.5, 1.0, 1.0]
    numbers[place] = bad
    plan = plan_projection(*numbers, 0.2)
    assert plan.coefficient == 0.0
    assert plan.cosine_before is None
    assert str(bad) in plan.reason


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0.0, 0.0, 1.0), "gradient is zero"),
        ((0.0, 1.0, 0.0), "protected direction is zero"),
        ((0.0, -1.0, 1.0), "is -1.0"),
        ((-9.0, 2.0, 3.0), "not the squared norms"),
        ((-1e5, 1e60, 1e-50), "overflows float32"),
    ],
)
def test_numbers_without_an_answer_change_nothing_and_say_why(numbers, words):
    plan = plan_projection(*numbers, 0.2)
    assert plan.coefficient == 0.0
    assert words in plan.reason
    assert plan_projection(-0.5, 1.0, 1.0, 0.2).reason is None


@pytest.mark.parametrize("cosine", [-0.9, -0.1, 0.0, 0.1])
def test_the_promise_has_the_norm_of_the_gradient_before(cosine):
    g, p = pair(cosine, norm_g=3.0, norm_p=0.5)
    after = projected(g, p, 0.2)
    assert float(after @ p) == pytest.approx(0.2 * float(g.norm() * p.norm()))
    kept = float(after @ p) >= 0.2 * float(after.norm() * p.norm())
    assert kept == (cosine <= -0.2), "with the norm after, it holds where the step became shorter"


@pytest.mark.parametrize("gamma", [-0.1, 1.0, math.nan])
def test_gamma_outside_its_range_is_refused(gamma):
    with pytest.raises(GuardError, match="gamma"):
        projection_coefficient(-0.5, 1.0, 1.0, gamma)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lists_of_tensors_are_projected_in_place(scale, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (), (5,), (2, 2, 2)]
    p = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    g = [(scale * (torch.randn(shape, generator=generator) - x)).to(dtype) for shape, x in zip(shapes, p, strict=True)]
    g[0] = g[0].T.contiguous().T  # not contiguous
    before, same = torch.cat([x.double().flatten() for x in g]), [x.data_ptr() for x in g]
    flat_p = torch.cat([x.double().flatten() for x in p])
    result = project_gradient(g, p)
    after = torch.cat([x.double().flatten() for x in g])
    assert same == [x.data_ptr() for x in g]
    expected = projected(before, flat_p, 0.2)
    assert (after - expected).norm() < 1e-6 * expected.norm()
    assert result.coefficient > 0
    assert result.norm_after == pytest.approx(float(after.norm()), rel=1e-6)
    assert result.cosine_after == pytest.approx(float(after @ flat_p / after.norm() / flat_p.norm()), abs=1e-6)
    assert result.cosine_before < 0


@pytest.mark.parametrize(
    ("g", "p", "words"),
    [
        ([torch.ones(2)], [], "as long as"),
        ([torch.ones(2)], [torch.ones(3)], "shapes"),
        ([None], [torch.ones(3)], "found None at 0"),
    ],
)
def test_lists_that_do_not_match_are_refused(g, p, words):
    with pytest.raises(GuardError, match=words):
        project_gradient(g, p)
