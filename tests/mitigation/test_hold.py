"""The controller of `mitigation="hold"` in a world whose change of pass@1 is known."""

import itertools
import math
import random
from dataclasses import asdict, replace

import pytest
import torch

from passk_guard import GuardError, HoldController, passk_advantages
from passk_guard.change import FusedCurve
from passk_guard.mitigation import HoldMeasurement, HoldState, first_multiplier
from passk_guard.mitigation.hold import part_of
from tests.helpers.populations import draw, population, true_moments

NOISE, BIAS = 0.004, 0.02  # of a window's change; of the level, which errs in one direction for a whole run


class World:
    """Training moves pass@1 by b (lambda - mu) a step; a check every few steps measures it with noise."""

    def __init__(self, b, every, mu, seed, controller, state=None):
        self.b, self.every, self.mu, self.controller = b, every, mu, controller
        self.random = random.Random(seed)
        self.bias = self.random.gauss(0, BIAS)
        self.state = controller.begin() if state is None else state
        self.one, self.then, self.step = 0.0, 0.0, 0
        self.path, self.multipliers = [0.0], []

    def check(self, fails):
        measured = None
        if not fails:
            found = self.one - self.then + self.random.gauss(0, NOISE)
            measured = HoldMeasurement(self.one + self.bias, BIAS, found, NOISE, self.every)
        self.state = self.controller.step(self.state, measured)
        self.then = self.one

    def run(self, steps, fails=lambda step: False):
        for _ in range(steps):
            if self.step and self.step % self.every == 0:
                self.check(fails(self.step))
            self.one += self.b * (self.state.multiplier - self.mu(self.step))
            self.one = min(max(self.one, -0.5), 0.4)
            self.step += 1
            self.path.append(self.one)
            self.multipliers.append(self.state.multiplier)
        return self


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("b", "every", "steps", "mu", "lowest"),
    [
        (0.02, 5, 180, 1.0, -0.09),
        (0.02, 10, 180, 1.0, -0.12),  # as fast for its checks as it may be: without a bound on the gains it swings
        (0.05, 5, 180, 1.0, -0.17),  # the first window alone costs .125
        (0.002, 5, 600, 1.0, -0.09),
        (4e-4, 50, 4000, 1.0, -0.09),
        (1e-4, 50, 8000, 1.0, -0.09),
    ],
)
def test_it_settles_at_any_speed(b, every, steps, mu, lowest, seed):
    world = World(b, every, lambda step: mu, seed, HoldController()).run(steps)
    tail = world.path[-steps // 4 :]
    assert min(world.path) > lowest
    assert max(tail) - min(tail) < 0.02, "no oscillation"
    assert sum(tail) / len(tail) == pytest.approx(BIAS / 2 - world.bias, abs=0.012), "half an error above its level"
    assert world.state.multiplier == pytest.approx(mu, abs=0.15)


def test_it_releases_when_the_conflict_is_gone():
    world = World(0.02, 5, lambda step: 1.0 if step < 90 else -0.3, 0, HoldController()).run(180)
    assert world.multipliers[80] > 0.8
    assert world.multipliers[-1] == 0.0


def test_missing_windows_hold_and_then_fall_back_to_what_was_learned():
    world = World(0.02, 5, lambda step: 1.0, 1, HoldController()).run(90)
    before, seen = world.state, []
    for _ in range(12):
        world.state = world.controller.step(world.state, None)
        seen.append(world.state.multiplier)
    assert seen[0] == before.multiplier
    assert seen[-1] == pytest.approx(before.trusted, abs=1e-3)
    assert world.state.trusted == before.trusted
    distance = [abs(value - before.trusted) for value in seen]
    assert all(b <= a for a, b in itertools.pairwise(distance)), "it never runs away"


def test_windows_missing_at_random_do_not_unsettle_it():
    lost = random.Random(0)
    world = World(0.02, 5, lambda step: 1.0, 2, HoldController()).run(240, lambda step: lost.random() < 0.3)
    tail = world.path[-60:]
    assert max(tail) - min(tail) < 0.04
    assert min(world.path) > -0.13


def test_a_run_that_is_resumed_goes_on_as_it_was():
    def world():
        return World(0.02, 5, lambda step: 1.0, 3, HoldController())

    whole, first = world().run(120), world().run(63)
    first.state = HoldState(**asdict(first.state))
    assert first.run(57).path == whole.path
    assert first.state == whole.state


def test_one_step_by_hand():
    controller = HoldController(tolerance=0.01)
    state = HoldState(0.5, 0.4, 0.0, change=-0.02, multiplier_then=0.7, effect=0.0)
    after = controller.step(state, HoldMeasurement(-0.05, 0.02, -0.03, 0.001, 5))
    assert after.effect == pytest.approx((0.01 - 3 * 0.001) / 0.2)  # 0.035: the bound 0.6 / (8 x 0.035) is above 1
    shortfall, rate = -0.01 + 0.02 / 2 + 0.05, -0.03 / 5 / 2
    assert after.rate == pytest.approx(rate)
    assert after.trusted == pytest.approx(0.4 + 0.2 * 5 * shortfall)
    assert after.multiplier == pytest.approx(after.trusted + 8 * shortfall - 20 * rate)
    strong = controller.step(replace(state, effect=0.25), HoldMeasurement(-0.05, 0.02, -0.03, 0.001, 5))
    gain = 0.6 / (8 * 0.8 * 0.25)
    assert strong.trusted == pytest.approx(0.4 + gain * 0.2 * 5 * shortfall)
    assert strong.multiplier == pytest.approx(strong.trusted + gain * (8 * shortfall - 20 * rate))
    lead = controller.step(state, HoldMeasurement(0.09, 0.02, 0.03, 0.001, 5))
    shortfall, rate = -0.01 + 0.02 / 2 - 0.09, 0.03 / 5 / 2
    assert lead.multiplier == pytest.approx(lead.trusted + (8 * shortfall - 20 * rate) / 4), "it lets go slowly"
    fall = HoldMeasurement(-0.9, 0.1, -0.5, 0.01, 50)
    assert controller.step(controller.begin(), fall).multiplier == controller.largest
    assert controller.step(state, fall).effect == 0.3, "a fall that something else brought does not stop the controller"


def test_a_lead_takes_a_share_of_a_large_lambda():
    controller = HoldController()
    lead = HoldMeasurement(0.12, 0.04, 0.0, 0.01, 5)  # .1 above, less half an error: .1 x .2 a step x 5 steps
    for before, after in ((2.0, 2.0 * math.exp(-0.1 / 0.5)), (0.4, 0.4 - 0.1), (0.05, 0.0)):
        assert controller.step(HoldState(before, before), lead).trusted == pytest.approx(after)


@pytest.mark.parametrize("settings", [{"tolerance": -0.1}, {"tolerance": 1.0}, {"start": -1.0}, {"caution": math.nan}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(GuardError, match=next(iter(settings))):
        HoldController(**settings)


def test_the_first_lambda_is_the_one_at_which_pass_at_1_stands_still():
    world, generator = population(-0.5), torch.Generator().manual_seed(0)
    inner, norm_sq, _ = true_moments(world, 8).tolist()
    found = [first_multiplier(draw(world, 64, 16, generator), 8) for _ in range(60)]
    known = [value for value in found if value is not None]
    assert len(known) > 50
    assert 0.7 < sum(value > -inner / norm_sq for value in known) / len(known) < 0.95, "from above, by one error"
    assert sum(known) / len(known) < -2 * inner / norm_sq


def test_the_first_lambda_without_a_conflict_and_without_an_angle():
    clear = draw(population(0.8), 128, 16, torch.Generator().manual_seed(0))
    assert first_multiplier(clear, 8) == 0.0
    assert first_multiplier(part_of(clear, torch.arange(128) < 3), 8) is None
    controller = HoldController()
    assert (controller.begin(0.0).multiplier, controller.begin(None).multiplier) == (0.0, controller.start)


def test_a_part_of_a_probe():
    probe = replace(draw(population(-0.5), 6, 16, torch.Generator().manual_seed(0)), prompt_keys=tuple("abcdef"))
    part = part_of(probe, torch.tensor([True, False, True, False, True, False]))
    rows = [0, 2, 4, 6, 8, 10]
    assert torch.equal(part.gram, probe.gram[rows][:, rows])
    assert (part.num_correct.tolist(), list(part.prompt_keys)) == (probe.num_correct[::2].tolist(), ["a", "c", "e"])
    assert not part_of(replace(probe, prompt_keys=()), torch.ones(6, dtype=torch.bool)).prompt_keys


def test_a_measurement_from_the_fused_curve():
    fused = FusedCurve().with_level(0.6, 0.03**2)
    assert HoldMeasurement.of(fused, None, 5) is None
    assert HoldMeasurement.of(fused.with_gap(), None, 5, 0.6) is None


def test_held_advantages_are_those_of_both_objectives():
    correct = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]])
    mask = torch.tensor([[True] * 4, [True, True, True, False], [True] * 4])
    parts = [passk_advantages(correct, k, mask=mask, floor=floor) for k, floor in ((3, 0.5), (1, None))]
    for hold, longest in ((0.7, 1.0), (4.0, 4.0)):
        held = passk_advantages(correct, 3, mask=mask, floor=0.5, hold=hold)
        assert torch.allclose(held, (parts[0] + hold * parts[1]) / longest)
    with pytest.raises(GuardError, match="hold"):
        passk_advantages(correct, 3, hold=-0.1)
