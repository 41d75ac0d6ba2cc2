"""Gram matrices of every kind: an estimate within its bounds, "undetermined" with a reason, or a refusal."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from passk_guard import GuardError, estimate_pooled, run_p_value, solve_floor
from passk_guard.estimation.evidence import RunEvidence, conflict_check
from passk_guard.estimation.records import ProbeGram
from passk_guard.mitigation import FloorState, smooth_floor
from tests.fuzz.strategies import NUMBER, SCALAR
from tests.helpers.populations import draw as drawn
from tests.helpers.populations import population

SCALE = st.sampled_from([0.0, 5e-324, 1e-300, 1e-100, 1e-30, 1e-10, 1.0, 1e10, 1e30, 1e100, 1e150, 1e300])
ODD_ENTRY = st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1.0, 1e30, 0.0])


@st.composite
def probes(draw, n=8):
    """Real score sums at any scale, some of them zero, doubled, or of very different sizes."""
    m = draw(st.integers(0, 12))
    seed = draw(st.integers(0, 50))
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randn(2 * m, draw(st.sampled_from([1, 2, 40])), dtype=torch.float64, generator=generator)
    rows = draw(st.lists(st.tuples(st.integers(0, max(2 * m - 1, 0)), st.sampled_from([0.0, 1e-8, 1e8])), max_size=3))
    for row, factor in rows:
        if m:
            sums[row] *= factor
    if draw(st.booleans()) and m > 1:
        sums[m - 1] = sums[0]
    root = math.sqrt(draw(SCALE))
    gram = (root * sums) @ (root * sums).T
    counts = torch.tensor(draw(st.lists(st.integers(0, n), min_size=m, max_size=m)), dtype=torch.int64)
    return ProbeGram(gram, torch.full((m,), n), counts, draw(st.sampled_from([(), tuple(range(m)), (0,) * m])))


def check(estimate):
    """What every estimate states."""
    assert estimate.status in ("conflict", "clear", "undetermined")
    assert estimate.reason
    numbers = [v for v in vars(estimate).values() if isinstance(v, float)]
    assert all(math.isfinite(v) for v in numbers), vars(estimate)
    assert 0 <= estimate.pass_at_1 <= estimate.pass_at_k + 1e-12 <= 1 + 2e-12
    if estimate.cosine is None:
        assert estimate.status == "undetermined"
        return
    assert -1 <= estimate.cosine <= 1
    assert -1 <= estimate.ci_low <= estimate.ci_high <= 1
    assert estimate.norm1_sq > 0 < estimate.normk_sq
    assert (estimate.status == "conflict") == (estimate.ci_high < estimate.threshold)
    assert (estimate.status == "clear") == (estimate.ci_low > estimate.threshold)
    assert estimate.curve is None or 1 <= estimate.k_star <= int(estimate.curve.k[-1])


def estimated(given_probes, k=4, **options):
    """The estimate, the floor and the evidence, all checked; None where the probe is refused."""
    try:
        estimate = estimate_pooled(given_probes, k, **options)
        floor = solve_floor(given_probes, k, gamma=0.2)
        check_of_it = conflict_check(given_probes[-1], k)
        running = run_p_value(given_probes, k)
    except GuardError:
        return None
    check(estimate)
    assert floor.status in ("solved", "not_needed", "no_floor_suffices", "undetermined")
    assert (floor.floor is None) == (floor.status in ("no_floor_suffices", "undetermined"))
    if floor.floor is not None:
        assert 0 <= floor.floor <= 1
        assert math.isfinite(floor.standard_error)
        state = smooth_floor(FloorState(), floor, 0.8, largest=1.0)
        assert 0 <= state.floor <= 1
        assert math.isfinite(state.precision)
    assert 0 < RunEvidence().with_check(check_of_it).p_value <= 1
    assert len(running) == len(given_probes)
    assert all(0 < p <= 1 for p in running)
    return estimate


@given(st.lists(probes(), min_size=1, max_size=3), st.integers(1, 8), st.sampled_from([-0.5, 0.0, 0.3]))
def test_score_sums_of_any_size(given_probes, k, threshold):
    estimated(given_probes, k, threshold=threshold)


@given(st.integers(0, 30), st.sampled_from([1e-30, 1e-10, 1.0, 1e10, 1e30]), st.sampled_from([-0.6, 0.3]))
def test_the_scale_of_the_gradients_changes_nothing(seed, scale, cosine):
    probe = drawn(population(cosine), 8, 8, torch.Generator().manual_seed(seed))
    one = estimated([probe], 4)
    other = estimated([ProbeGram(probe.gram * scale, probe.num_samples, probe.num_correct)], 4)
    assert one.status == other.status
    if one.cosine is None:
        return
    for name in ("cosine", "ci_low", "ci_high"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-6)


@given(
    probes(),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400), ODD_ENTRY), min_size=1, max_size=3),
    st.booleans(),
)
def test_a_matrix_of_no_vectors(probe, changes, symmetric):
    """NaN, infinity, an asymmetric or an impossible entry: no number comes of it."""
    size = probe.gram.shape[0]
    gram = probe.gram.clone()
    for row, column, value in changes:
        if size:
            gram[row % size, column % size] = value
            if symmetric:
                gram[column % size, row % size] = value
    found = estimated([ProbeGram(gram, probe.num_samples, probe.num_correct)])
    if found is not None:
        assert bool(gram.isfinite().all())
        length = gram.diagonal().clamp(min=0).sqrt()
        room = 1e-5 * float(gram.abs().max())
        assert bool((gram.abs() <= 1.01 * length[:, None] * length + room).all())
        assert bool(((gram - gram.T).abs() <= 2e-4 * gram.abs() + room).all())


@given(st.one_of(NUMBER, SCALAR), st.one_of(NUMBER, SCALAR))
def test_any_confidence_and_threshold(confidence, threshold):
    probe = drawn(population(-0.5), 8, 8, torch.Generator().manual_seed(0))
    estimated([probe], threshold=threshold, confidence=confidence)


@given(st.one_of(NUMBER, SCALAR), st.one_of(NUMBER, SCALAR), st.one_of(st.none(), NUMBER, SCALAR))
@example(0.2, 1.0, math.nan)
@example(0.2, 1.0, math.inf)
def test_any_bounds_of_the_floor(gamma, largest, cap):
    probe = drawn(population(-0.5), 8, 8, torch.Generator().manual_seed(0))
    try:
        solution = solve_floor([probe], 4, gamma=gamma, largest=largest, cap=cap)
    except GuardError:
        return
    if solution.floor is not None:
        assert 0 <= solution.floor <= min(largest, math.inf if cap is None else cap)


@given(st.one_of(NUMBER, SCALAR), st.one_of(NUMBER, SCALAR))
@example(0.8, math.nan)
@example(math.nan, 1.0)
def test_any_smoothing(average, caution):
    probe = drawn(population(-0.5), 8, 8, torch.Generator().manual_seed(0))
    solution = solve_floor([probe], 4, gamma=0.2)
    assert solution.floor is not None
    try:
        state = smooth_floor(FloorState(0.3, 2.0), solution, average, caution=caution, largest=1.0)
    except GuardError:
        return
    assert 0 <= state.floor <= 1
