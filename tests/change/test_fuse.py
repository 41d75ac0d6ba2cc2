"""Level and change fused: equal to generalised least squares, and better than either alone."""

import dataclasses
import json
import math

import pytest
import torch

from passk_guard.change import Fused, FusedCurve
from tests.change.test_cumulate import a_run

# Levels y_t with variances, and changes D_t with variances and covariances with y_t's error; None where missing.
LEVELS = [(0.30, 0.0025), (0.36, 0.0016), (0.33, 0.003), (0.41, 0.002)]
CHANGES = [(0.03, 1e-4, 2e-4), (0.01, 2e-4, -3e-4), (0.05, 3e-4, 1e-4)]


def least_squares(levels, changes):
    """Estimate and covariance of J_0..J_T by weighting with the inverse of the full error covariance."""
    rows, values, times = [], [], []
    size = len(levels)
    for t, level in enumerate(levels):
        if level is not None:
            rows.append([float(s == t) for s in range(size)])
            values.append(level[0])
            times.append(("level", t))
    for t, change in enumerate(changes):
        if change is not None:
            rows.append([float(s == t + 1) - float(s == t) for s in range(size)])
            values.append(change[0])
            times.append(("change", t))
    noise = torch.zeros(len(values), len(values), dtype=torch.float64)
    for i, (kind, t) in enumerate(times):
        noise[i, i] = (levels if kind == "level" else changes)[t][1]
        if kind == "change" and ("level", t) in times:
            j = times.index(("level", t))
            noise[i, j] = noise[j, i] = changes[t][2]
    design, found = torch.tensor(rows, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    weight = noise.inverse()
    covariance = (design.T @ weight @ design).inverse()
    return covariance @ design.T @ weight @ found, covariance


def filtered(levels, changes):
    curve = FusedCurve()
    for t, level in enumerate(levels):
        curve = curve if level is None else curve.with_level(*level)
        if t < len(changes):
            curve = curve.with_gap() if changes[t] is None else curve.with_window(*changes[t])
    return curve


@pytest.mark.parametrize(
    ("levels", "changes"),
    [
        (LEVELS, CHANGES),
        ([LEVELS[0], None, *LEVELS[2:]], CHANGES),
        ([None, *LEVELS[1:]], CHANGES),
        ([*LEVELS[:3], None], CHANGES),
        (LEVELS, [CHANGES[0], None, CHANGES[2]]),
        ([*LEVELS[:3], None], [None, *CHANGES[1:]]),
    ],
    ids=["complete", "no level within", "no first level", "no last level", "no window within", "no first window"],
)
def test_equals_generalised_least_squares_over_everything(levels, changes):
    found, covariance = least_squares(levels, changes)
    curve = filtered(levels, changes)
    assert curve.now == pytest.approx(float(found[-1]), abs=1e-6)
    assert curve.start == pytest.approx(float(found[0]), abs=1e-6)
    assert curve.now_se**2 == pytest.approx(float(covariance[-1, -1]), rel=1e-5)
    assert curve.start_var == pytest.approx(float(covariance[0, 0]), rel=1e-5)
    variance = covariance[-1, -1] + covariance[0, 0] - 2 * covariance[0, -1]
    assert curve.change_se**2 == pytest.approx(float(variance), rel=1e-5)


def test_nothing_is_said_to_be_known_before_it_is():
    nothing = FusedCurve()
    assert nothing.now_se == math.inf
    assert (nothing.change, nothing.change_se) == (0, 0)
    without_level = nothing.with_window(0.02, 1e-4, 0.0)
    assert without_level.now_se == math.inf
    assert without_level.change == pytest.approx(0.02)
    assert without_level.change_se == pytest.approx(0.01)
    gap = nothing.with_level(0.3, 0.01).with_gap()
    assert (gap.now_se, gap.change_se) == (math.inf, math.inf)
    assert gap.start_var == pytest.approx(0.01, rel=1e-5)


def test_solved_and_hopeless_probes_are_not_certain():
    found, levels, _ = a_run(1)
    flat = dataclasses.replace(levels[0], level_1=0.0, level_1_se=0.0)
    assert Fused().with_level(flat).pass_at_1.now_se == pytest.approx(1 / 32, rel=1e-3)
    assert Fused().with_level(flat).with_window(found[0]).pass_at_1.now_se < 0.1


def test_missing_windows_and_levels_of_a_run():
    found, levels, _ = a_run(2)
    state = Fused().with_level(levels[0]).with_window(None)
    assert state.pass_at_k.change_se == math.inf
    wild = dataclasses.replace(found[0], pass_at_k_se=math.inf)
    assert Fused().with_level(levels[0]).with_window(wild) == state
    assert state.with_level(None) == state
    again = state.with_level(levels[1]).with_window(found[1])
    assert again.pass_at_1.change_se > levels[0].level_1_se


def test_goes_on_from_a_checkpoint_bit_for_bit():
    found, levels, _ = a_run(4)
    state = straight = Fused()
    for t, (window, level) in enumerate(zip(found, levels, strict=True)):
        straight = straight.with_level(level).with_window(window)
        state = state.with_level(level)
        if t == 2:
            state = Fused.restored(json.loads(json.dumps(dataclasses.asdict(state))))
        state = state.with_window(window)
    assert state == straight


def test_fusing_beats_the_sum_of_windows_and_two_fresh_samples():
    runs, errors, claimed = 40, [], []
    for seed in range(runs):
        found, levels, exact = a_run(13, 32, seed=seed, size=0.4, drift=0.03)
        state, total = Fused(), 0.0
        for t in range(12):
            state = state.with_level(levels[t]).with_window(found[t])
            total += found[t].pass_at_1
        state, truth = state.with_level(levels[12]), exact[11][0]
        fresh = levels[12].level_1 - levels[0].level_1
        errors.append([state.pass_at_1.change - truth, total - truth, fresh - truth])
        claimed.append(state.pass_at_1.change_se)
    fused, summed, fresh = (float(x) for x in torch.tensor(errors).square().mean(0).sqrt())
    assert fused < summed
    assert fused < fresh / 1.5
    assert fused == pytest.approx(sum(claimed) / runs, rel=0.35), "its standard error is the one it has"
