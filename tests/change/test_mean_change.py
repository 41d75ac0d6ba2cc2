"""The change of any mean: exactly unbiased, pass@1's on 0/1 scores, and on a scale of about 1."""

import itertools
import math

import pytest
import torch

from passk_guard import GuardError
from passk_guard.change import HeldCurve, estimate_change, estimate_mean_change, per_prompt
from tests.change.test_estimate import NOW, THEN, draw
from tests.change.worlds import every_draw

SCORES = torch.tensor([[0.9, -0.4, 0.3], [1.2, 0.1, 0.7], [-0.2, 0.5, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize("engine", [False, True], ids=["of the policy", "of another engine"])
def test_exactly_unbiased_with_coefficients_fitted_on_the_other_prompts(engine, monkeypatch):
    monkeypatch.setattr(per_prompt, "_FEWEST_PROMPTS", 3)
    sizes, then, now = (2, 2, 1), THEN[:3], NOW[:3]
    sampled = (0.7 * then + 0.1) if engine else then
    options = [every_draw(p, size) for p, size in zip(sampled, sizes, strict=True)]
    mean, level, total, moved = 0.0, 0.0, 0.0, 0.0
    for picks in itertools.product(*(zip(*option, strict=True) for option in options)):
        logs, apart = torch.zeros(2, 3, 2, dtype=torch.float64)
        scores = torch.full((3, 2), torch.nan, dtype=torch.float64)
        for row, (taken, _) in enumerate(picks):
            logs[row, : len(taken)] = (now / then).log()[row, taken]
            apart[row, : len(taken)] = (then / sampled).log()[row, taken]
            scores[row, : len(taken)] = SCORES[row, taken]
        found = estimate_mean_change(logs, scores, sampler=apart if engine else None)
        chance = math.prod(float(p) for _, p in picks)
        mean, level, total = mean + chance * found.change, level + chance * found.level, total + chance
        step = torch.where(scores.isfinite(), apart.exp() * torch.expm1(logs), 0) / torch.tensor([[2], [2], [1]])
        others = scores.nansum(1, keepdim=True) - scores.nan_to_num()
        plain = float((step * (scores.nan_to_num() - others)).sum(1).mean())
        moved = max(moved, abs(found.change - plain))
    assert total == pytest.approx(1, abs=1e-12)
    assert mean == pytest.approx(float(((now - then) * SCORES).sum(1).mean()), abs=1e-12)
    assert level == pytest.approx(float((sampled * SCORES).sum(1).mean()), abs=1e-12)
    assert moved > 0.01, "the coefficients did something"


def test_on_verdicts_it_is_the_change_of_pass_at_1():
    logs, correct = draw()
    correct[3, 2:] = -1
    keys, clusters = [f"prompt {i // 2}" for i in range(24)], [i // 6 for i in range(24)]
    scores = torch.where(correct >= 0, correct.double(), torch.nan)
    for more in ({}, {"keys": keys}, {"clusters": clusters}, {"noise": 0.2}, {"sampler": 0.1 * logs}):
        one, mean = estimate_change(logs, correct, 2, **more), estimate_mean_change(logs, scores, **more)
        found = mean.change, mean.change_se, mean.level, mean.level_se, mean.level_change_cov
        expected = one.pass_at_1, one.pass_at_1_se, one.level.level_1, one.level.level_1_se, one.level_1_change_cov
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-14)
        assert mean.num_prompts == one.num_prompts


def test_what_cannot_be_estimated_is_refused():
    logs, correct = draw()
    with pytest.raises(GuardError, match="at least 3 different prompts"):
        estimate_mean_change(logs[:2], correct[:2].double())
    with pytest.raises(GuardError, match="none in row 1"):
        estimate_mean_change(logs, torch.where(torch.arange(24)[:, None] == 1, torch.inf, correct.double()))


def test_the_first_sample_sets_the_scale():
    values = torch.tensor([-3.0, 1.0, 5.0])
    assert HeldCurve("f", scale=0.0).on_the_scale_of(values[:0]).scale == 0
    held = HeldCurve("f", scale=0.0).on_the_scale_of(values)
    assert (held.low, held.scale) == (-3, 8)
    assert held.on_the_scale_of(10 * values) is held
    assert held.units(values).tolist() == [0, 0.5, 1]
    for within in (torch.tensor([0.2, 0.3]), torch.tensor([7.0, 7.0])):
        assert HeldCurve("f", scale=0.0).on_the_scale_of(within).scale == 1
    scores = torch.rand(24, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logs = draw()[0]
    level = held.with_level(estimate_mean_change(torch.zeros(24, 8), scores))
    found = estimate_mean_change(logs, scores)
    after = level.with_window(found)
    assert level.curve.now == pytest.approx(float(scores.mean()), abs=1e-6)
    assert level.curve.now_se == pytest.approx(max(found.level_se, 1 / 24), rel=1e-4)
    assert after.curve.change == pytest.approx(found.change, rel=0.05)
    assert level.with_window(None).curve.now_se == math.inf
