"""Change since the start: sums, their intervals, and the sequence over simulated runs."""

import dataclasses
import json
import math

import pytest
import torch

from passk_guard import GuardError
from passk_guard.change import ChangeSums, cumulate, estimate_change
from passk_guard.change.cumulate import sequence_width
from tests.change.worlds import World


def a_run(windows=6, m=32, *, seed=0, size=0.15, drift=0.05, world=None):
    """Estimates of each window, the levels of the draws, and exact changes since the start of (pass@1, pass@4)."""
    g = torch.Generator().manual_seed(seed)
    world = world or World.random()
    start, found, levels, exact = world, [], [], []
    for _ in range(windows):
        rows, samples, correct = world.draw(m, 8, g)
        after = world.moved(size, drift, g)
        found.append(estimate_change(world.log_ratios(after, rows, samples), correct, 4))
        levels.append(found[-1].level)
        world = after
        exact.append((world.passed(1) - start.passed(1), world.passed(4) - start.passed(4)))
    return found, levels, exact


def test_sums_of_changes_and_of_variances():
    found, _, _ = a_run(3)
    run = cumulate(found)
    assert (run.windows, run.missed, run.k) == (3, 0, 4)
    assert run.pass_at_1.total == pytest.approx(sum(w.pass_at_1 for w in found))
    assert run.pass_at_k.se == pytest.approx(math.hypot(*(w.pass_at_k_se for w in found)))
    for curve in (run.pass_at_1, run.pass_at_k):
        assert curve.seq_low < curve.ci_low < curve.total < curve.ci_high < curve.seq_high
    narrow = cumulate(found, confidence=0.8)
    assert narrow.pass_at_1.ci_low > run.pass_at_1.ci_low
    assert narrow.pass_at_1.seq_low > run.pass_at_1.seq_low


def test_a_run_without_windows_has_not_changed_and_missed_windows_are_counted():
    nothing = cumulate([])
    assert (nothing.windows, nothing.pass_at_1.seq_low, nothing.pass_at_1.ci_high) == (0, 0, 0)
    found, _, _ = a_run(2)
    wild = dataclasses.replace(found[0], pass_at_k=-math.inf, pass_at_k_se=math.inf)
    run = cumulate([found[0], None, wild, found[1]])
    assert (run.windows, run.missed) == (2, 2)
    assert run.pass_at_k == cumulate(found).pass_at_k


def test_sums_go_on_from_a_checkpoint():
    found, _, _ = a_run(5)
    sums = ChangeSums()
    for window in found[:3]:
        sums = sums.with_window(window)
    sums = ChangeSums.restored(json.loads(json.dumps(dataclasses.asdict(sums))))
    for window in found[3:]:
        sums = sums.with_window(window)
    assert sums.change() == cumulate(found)


def test_the_sequence_is_the_normal_mixture_and_tightest_where_it_is_said_to_be():
    # Width over standard error at 20 typical windows, by minimising over r directly.
    best = min(
        math.sqrt((1 + r) * math.log((1 + r) / (r * 0.05**2))) for r in (10 ** (i / 1000) for i in range(-3000, 1000))
    )
    assert sequence_width(20.0, 1.0, 0.05) / 20**0.5 == pytest.approx(best, rel=1e-5)
    assert sequence_width(1e-6, 1e-7, 0.05) == pytest.approx(1e-3 * sequence_width(1.0, 0.1, 0.05), rel=1e-12)
    assert sequence_width(20.0, 1.0, 0.05, 30) > sequence_width(20.0, 1.0, 0.05)


def test_the_first_window_that_moved_sets_the_scale_of_the_sequence_for_good():
    found, _, _ = a_run(3)
    still = dataclasses.replace(found[0], pass_at_1=0.0, pass_at_1_se=0.0)
    sums = ChangeSums().with_window(still)
    assert sums.change().pass_at_1.seq_high == 0
    for window in found:
        sums = sums.with_window(window)
    curve = sums.change().pass_at_1
    width = sequence_width(curve.se**2, found[0].pass_at_1_se ** 2, 0.05, sums.pass_at_1.degrees)
    assert curve.seq_high - curve.total == pytest.approx(width)


def test_the_sequence_holds_at_all_looks_of_a_run_where_single_intervals_do_not():
    world = World.random(500)
    left = {"1 at any": 0, "k at any": 0, "pointwise at any": 0}
    runs, looks = 40, 12
    for seed in range(runs):
        found, _, exact = a_run(looks, seed=seed, world=world, drift=0.0)
        sums, out = ChangeSums(), set()
        for window, (one, many) in zip(found, exact, strict=True):
            sums = sums.with_window(window)
            run = sums.change()
            if not run.pass_at_1.seq_low <= one <= run.pass_at_1.seq_high:
                out.add("1 at any")
            if not run.pass_at_k.seq_low <= many <= run.pass_at_k.seq_high:
                out.add("k at any")
            if not run.pass_at_1.ci_low <= one <= run.pass_at_1.ci_high:
                out.add("pointwise at any")
        for name in out:
            left[name] += 1
    assert left["1 at any"] <= 2
    assert left["k at any"] <= 2
    assert left["pointwise at any"] > 4


def test_bad_input_is_named():
    found, _, _ = a_run(2)
    with pytest.raises(GuardError, match="windows of one `k`; found k=8 after k=4"):
        cumulate([found[0], dataclasses.replace(found[1], k=8)])
    with pytest.raises(GuardError, match="0 < `confidence` < 1; found 1"):
        cumulate(found, confidence=1)
