"""The estimate over prompts: exactly unbiased with fitted controls, invariant, and clear about bad input."""

import itertools
import math

import pytest
import torch

from passk_guard import GuardError
from passk_guard.change import estimate_change, estimate_level, per_prompt
from passk_guard.change.per_prompt import prompt_changes
from passk_guard.estimation.intervals import student_t_quantile
from tests.change.worlds import World, every_draw

THEN = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64)
NOW = torch.tensor([[0.3, 0.4, 0.3], [0.3, 0.1, 0.6], [0.6, 0.1, 0.3], [0.2, 0.3, 0.5]], dtype=torch.float64)
RIGHT = torch.tensor([[True, False, False], [True, True, False], [False, False, True], [True, False, False]])


def draw(m=24, n=8, *, seed=0, size=0.3):
    g = torch.Generator().manual_seed(seed)
    world = World.random(200, seed=seed)
    rows, samples, correct = world.draw(m, n, g)
    return world.log_ratios(world.moved(size, 0.2, g), rows, samples), correct


def two_completions(policy):
    """The same policy where the second and third completion are one: as many outcomes as the test has time for."""
    return torch.stack([policy[:, 0], policy[:, 1] + policy[:, 2]], 1)


@pytest.mark.parametrize("engine", [False, True], ids=["of the policy", "of another engine"])
@pytest.mark.parametrize(("sizes", "kinds"), [((2, 2, 2), 3), ((3, 2, 2, 1), 2)], ids=["equal", "varying"])
def test_exactly_unbiased_with_coefficients_fitted_on_the_other_prompts(sizes, kinds, engine, monkeypatch):
    monkeypatch.setattr(per_prompt, "_FEWEST_PROMPTS", 3)
    m, most = len(sizes), max(sizes)
    then, now, right = THEN[:m], NOW[:m], RIGHT[:m]
    if kinds == 2:
        then, now, right = two_completions(then), two_completions(now), right[:, :2] & torch.tensor([True, False])
    sampled = (0.7 * then + 0.3 / then.shape[1]) if engine else then
    options = [every_draw(p, size) for p, size in zip(sampled, sizes, strict=True)]
    mean, total, moved = torch.zeros(2, dtype=torch.float64), 0.0, 0.0
    for picks in itertools.product(*(zip(*option, strict=True) for option in options)):
        logs, correct = torch.zeros(m, most, dtype=torch.float64), torch.full((m, most), -1)
        apart = torch.zeros_like(logs)
        for row, (taken, _) in enumerate(picks):
            logs[row, : len(taken)] = (now / then).log()[row, taken]
            apart[row, : len(taken)] = (then / sampled).log()[row, taken]
            correct[row, : len(taken)] = right[row, taken].long()
        found = estimate_change(logs, correct, 2, sampler=apart if engine else None)
        chance = math.prod(float(p) for _, p in picks)
        mean += chance * torch.tensor([found.pass_at_1, found.pass_at_k], dtype=torch.float64)
        total += chance
        unfitted = prompt_changes(logs, correct == 1, correct >= 0, 2, apart)
        moved = max(moved, float((found.per_prompt - unfitted.change_1).abs().max()))
    p, q = ((policy * right).sum(1) for policy in (then, now))
    several = torch.tensor(sizes) >= 2
    exact = [float((q - p).mean()), float(((1 - p) ** 2 - (1 - q) ** 2)[several].mean())]
    assert total == pytest.approx(1, abs=1e-12)
    assert mean.tolist() == pytest.approx(exact, abs=1e-12)
    assert moved > 0.01, "the coefficients did something"


def test_intervals_of_one_window_cover_the_change_and_the_controls_take_noise_off():
    world, g = World.random(), torch.Generator().manual_seed(5)
    later = world.moved(0.15, -0.1, g)
    exact = (float((later.rates - world.rates).mean()), later.passed(4) - world.passed(4))
    inside, errors, plain, fresh = torch.zeros(2), [], [], []
    for _ in range(200):
        rows, samples, correct = world.draw(64, 8, g)
        logs = world.log_ratios(later, rows, samples)
        found = estimate_change(logs, correct, 4)
        for i, (value, se, nu) in enumerate(
            [
                (found.pass_at_1, found.pass_at_1_se, found.degrees),
                (found.pass_at_k, found.pass_at_k_se, found.degrees_k),
            ]
        ):
            inside[i] += abs(value - exact[i]) <= se * student_t_quantile(0.975, nu)
        errors.append((found.pass_at_1 - exact[0], found.pass_at_k - exact[1]))
        there = torch.ones_like(correct, dtype=torch.bool)
        plain.append(float(prompt_changes(logs, correct == 1, there, 4).plain_k.mean()) - exact[1])
        level = estimate_level(later.draw(64, 8, g)[2], 4).level_1
        fresh.append(level - found.level.level_1 - exact[0])
    assert 0.92 <= float(inside[0]) / 200 <= 0.985
    assert 0.92 <= float(inside[1]) / 200 <= 0.985
    errors, plain, fresh = (torch.tensor(x, dtype=torch.float64) for x in (errors, plain, fresh))
    assert errors.mean(0).abs().lt(3 * errors.std(0) / 200**0.5).all()
    assert errors[:, 1].std() < plain.std()
    assert errors[:, 0].std() < fresh.std() / 5


def test_masked_samples_and_those_without_a_verdict_might_as_well_not_be_there():
    logs, correct = draw()
    kept = estimate_change(logs[:, :6], correct[:, :6], 3)
    mask = torch.arange(8).expand(24, 8) < 6
    unscored = torch.where(mask, logs, torch.nan)
    by_mask = estimate_change(unscored, torch.where(mask, correct, 7), 3, mask=mask)
    by_verdict = estimate_change(unscored, torch.where(mask, correct, -1), 3)
    for found in (by_mask, by_verdict):
        assert found.pass_at_1 == pytest.approx(kept.pass_at_1, abs=1e-14)
        assert found.pass_at_k_se == pytest.approx(kept.pass_at_k_se, abs=1e-14)
        assert found.effective_samples == pytest.approx(kept.effective_samples, abs=1e-14)


def test_a_prompt_with_fewer_than_k_samples_enters_pass_at_1_alone():
    logs, correct = draw()
    correct[3, 2:] = -1
    found = estimate_change(logs, correct, 4)
    assert (found.num_prompts, found.num_prompts_k) == (24, 23)
    assert found.per_prompt.isfinite().all()
    assert found.per_prompt_k.isnan().nonzero().tolist() == [[3]]


def test_rows_of_one_prompt_are_one_prompt_with_the_samples_of_both():
    logs, correct = draw(24, 8)
    wide = estimate_change(logs.reshape(12, 16), correct.reshape(12, 16), 10)
    keys = [f"prompt {i // 2}" for i in range(24)]
    found = estimate_change(logs, correct, 10, keys=keys, groups=[i // 12 for i in range(24)])
    assert found.num_prompts == 12
    assert found.pass_at_k == pytest.approx(wide.pass_at_k, abs=1e-13)
    assert found.pass_at_1_se == pytest.approx(wide.pass_at_1_se, abs=1e-14)
    assert found.per_prompt.tolist() == pytest.approx(wide.per_prompt.repeat_interleave(2).tolist(), abs=1e-14)
    assert {label: group.num_prompts for label, group in found.groups.items()} == {0: 6, 1: 6}
    apart = estimate_change(logs, correct, 8)
    assert apart.num_prompts == 24


def test_groups_are_means_of_the_same_prompts():
    logs, correct = draw()
    labels = ["easy"] * 9 + ["hard"] * 14 + ["odd"]
    found = estimate_change(logs, correct, 4, groups=labels)
    parts = found.groups
    assert sum(g.num_prompts * g.pass_at_1 for g in parts.values()) / 24 == pytest.approx(found.pass_at_1)
    assert parts["easy"].pass_at_k == pytest.approx(float(found.per_prompt_k[:9].mean()))
    assert parts["hard"].pass_at_1_se == pytest.approx(float(found.per_prompt[9:23].std()) / 14**0.5)
    assert math.isnan(parts["odd"].pass_at_1_se), "one prompt has no error"
    by_tensor = estimate_change(logs, correct, 4, groups=torch.arange(24) % 2)
    assert set(by_tensor.groups) == {0, 1}


def test_neither_the_order_of_prompts_nor_that_of_samples_matters():
    logs, correct = draw()
    g = torch.Generator().manual_seed(1)
    rows, columns = torch.randperm(24, generator=g), torch.randperm(8, generator=g)
    one = estimate_change(logs, correct, 4)
    other = estimate_change(logs[rows][:, columns], correct[rows][:, columns], 4)
    torch.testing.assert_close(other.per_prompt, one.per_prompt[rows], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(other.per_prompt_k, one.per_prompt_k[rows], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("size", [1e-10, 1e-5])
def test_small_changes_scale_with_the_step(size):
    logs, correct = draw()
    unit = estimate_change(1e-4 * logs, correct, 4)
    found = estimate_change(size * logs, correct, 4)
    assert found.pass_at_1 / size == pytest.approx(unit.pass_at_1 / 1e-4, rel=1e-3)
    assert found.pass_at_k / size == pytest.approx(unit.pass_at_k / 1e-4, rel=1e-3)
    assert found.pass_at_1_se / size == pytest.approx(unit.pass_at_1_se / 1e-4, rel=1e-3)


def test_an_update_that_did_nothing_changed_nothing():
    _, correct = draw()
    found = estimate_change(torch.zeros(24, 8), correct, 4)
    assert (found.pass_at_1, found.pass_at_1_se, found.pass_at_k, found.pass_at_k_se) == (0, 0, 0, 0)
    assert found.effective_samples == pytest.approx(1)


def test_wild_ratios_leave_pass_at_1_finite_and_say_so():
    _, correct = draw()
    logs = torch.linspace(-50, 50, 24 * 8).reshape(24, 8)
    found = estimate_change(logs, correct, 8)
    assert math.isfinite(found.pass_at_1)
    assert 0 < found.effective_samples < 0.5
    beyond = estimate_change(torch.full((24, 64), 50.0), torch.zeros(24, 64), 64)
    assert (beyond.pass_at_k, beyond.pass_at_k_se) == (-math.inf, math.inf)
    assert beyond.pass_at_1_se == 0


@pytest.mark.parametrize("of_the_sampler_too", [False, True])
def test_known_rounding_noise_leaves_no_bias_beyond_the_error(of_the_sampler_too):
    """Ratios have a mean of exp(noise^2/2), or of 1 where the sampler rounds as the first score does."""
    world, g = World.random(), torch.Generator().manual_seed(2)
    _, _, correct = world.draw(4000, 8, g)
    noise = 0.5 * torch.randn(4000, 8, generator=g) - 0.125 * of_the_sampler_too
    found, ignored = estimate_change(noise, correct, 4, noise=0.5), estimate_change(noise, correct, 4)
    assert abs(found.pass_at_1) < 3 * found.pass_at_1_se
    assert abs(found.pass_at_k) < 3 * found.pass_at_k_se
    assert found.pass_at_1_se == pytest.approx(ignored.pass_at_1_se, rel=0.2)
    spread = float(found.per_prompt_k.std()) / 4000**0.5
    assert abs((ignored if of_the_sampler_too else found).pass_at_k) < 3 * spread
    assert of_the_sampler_too or abs(ignored.pass_at_k) > 3 * spread
    assert found.pass_at_k_se == pytest.approx(math.hypot(spread, found.pass_at_k - ignored.pass_at_k))


def test_levels_are_unbiased_and_vary_together_with_the_change():
    logs, correct = draw()
    found = estimate_change(logs, correct, 4)
    rates = correct.double().mean(1)
    assert found.level.level_1 == pytest.approx(float(rates.mean()))
    assert found.level == estimate_level(correct, 4)
    together = float(torch.cov(torch.stack([rates, found.per_prompt]))[0, 1]) / 24
    assert found.level_1_change_cov == pytest.approx(together)
    assert abs(found.level_k_change_cov) <= found.level.level_k_se * found.pass_at_k_se


def spoiled(value, where="logs"):
    logs, correct = draw()
    (logs if where == "logs" else correct)[2, 5] = value
    return logs, correct


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimate_change(*spoiled(torch.nan), 4), "finite `log_ratios`.*found nan at row 2, sample 5"),
        (lambda: estimate_change(*spoiled(-torch.inf), 4), "found -inf at row 2.*resample"),
        (lambda: estimate_change(*spoiled(800.0), 4), "at most 700; found 800"),
        (lambda: estimate_change(*spoiled(3, "correct"), 4), "1 .right., 0 .wrong. and -1.*Compare rewards"),
        (lambda: estimate_change(*draw(), 0), "whole number `k` >= 1; found 0"),
        (lambda: estimate_change(*draw(), 2.0), "whole number `k` >= 1; found 2.0"),
        (lambda: estimate_change(*draw(), 9), "found k=9, and as many samples in 0 of 24 prompts.*lower `k`"),
        (lambda: estimate_change(*draw(m=1), 2), "at least 3 different prompts.*found 1. Draw more prompts"),
        (lambda: estimate_change(*draw(m=4), 2, keys="aabb"), "at least 3 different prompts.*found 2"),
        (lambda: estimate_change(draw()[0], draw()[1][:, 1:], 2), r"`log_ratios` of the shape.*\(24, 7\)"),
        (lambda: estimate_change(draw()[0][0], draw()[1], 2), r"`log_ratios` to be a real tensor.*found \(8,\)"),
        (lambda: estimate_change(draw()[0], [[1]], 2), "`correct` to be a real tensor.*found list"),
        (lambda: estimate_change(*draw(), 2, mask=torch.ones(24, 7)), "`mask` of the shape of `correct`"),
        (lambda: estimate_change(*draw(), 2, keys="ab"), "`keys` for each of 24 rows; found 2"),
        (lambda: estimate_change(*draw(), 2, groups="ab"), "`groups` for each of 24 rows; found 2"),
        (
            lambda: estimate_change(*draw(m=4), 2, keys="abca", groups="xyzw"),
            "one group for each prompt; found rows of one of `keys`",
        ),
        (lambda: estimate_change(*draw(), 2, noise=-0.1), "`noise` >= 0 and finite, or None; found -0.1"),
        (
            lambda: estimate_change(*draw(), 2, mask=(torch.arange(24) != 7)[:, None].expand(24, 8)),
            "none in row 7: each is masked or has no verdict. Leave the row out",
        ),
        (lambda: estimate_level(draw()[1], 9), "found k=9"),
    ],
)
def test_bad_input_is_named_with_what_to_pass_instead(call, message):
    with pytest.raises(GuardError, match=message):
        call()
