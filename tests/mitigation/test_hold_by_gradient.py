"""mitigation="hold" for trainers without advantages: lambda of the controller is the length added along p."""

import math
import random
import shutil

import pytest
import torch

from passk_guard import HoldController
from passk_guard.callback.mitigator import MEASURED_OF
from passk_guard.mitigation import HoldMeasurement, plan_held, plan_projection
from tests.callback.test_guard import guard_of, journal
from tests.helpers.tiny import tiny_lm_trainer
from tests.mitigation.test_floor_guard import parameters, same
from tests.mitigation.test_gradient_guard import Engine, guard
from tests.mitigation.test_hold_guard import Multipliers

HOLD = {"mitigation": "hold", "refresh_steps": 2, "probe_prompts": 24, "min_effective_samples": 0.01}


def trained(cosine, reliability, plan, *, steps=400, every=5, length=0.02, seed=0):
    """Pass@1 and lambda of each step, where steps of one length meet grad J_1 at this cosine.

    p is grad J_1 plus noise, taken anew at each check. `plan(state, *scalars)` is what is done to a gradient.
    """
    generator, noise = torch.Generator().manual_seed(seed), random.Random(seed)
    controller, q = HoldController(), torch.zeros(300, dtype=torch.float64)
    state, one, then, q[0] = controller.begin(), 0.0, 0.0, 1.0

    def across():
        found = torch.randn(300, generator=generator, dtype=torch.float64)
        found[0] = 0
        return found / found.norm()

    path, multipliers = [], []
    for step in range(steps):
        if step % every == 0:
            if step:
                found = one - then + noise.gauss(0, 0.002)
                state = controller.step(state, HoldMeasurement(one, 0.01, found, 0.002, every))
            then, p = one, q + math.sqrt(1 / reliability - 1) * across()
        s = cosine(step)
        g = s * q + math.sqrt(1 - s**2) * across()
        found = plan(state.multiplier, float(g @ p), float(g @ g), float(p @ p))
        after = found.keeps * g + found.coefficient * p
        one = min(max(one + length * float(after @ q), -0.6), 0.4)
        path.append(one)
        multipliers.append(state.multiplier)
    return path, multipliers


def mean(values):
    return sum(values) / len(values)


def held(multiplier, *scalars):
    return plan_held(*scalars, multiplier)


@pytest.mark.parametrize("reliability", [1.0, 0.25])
def test_it_settles_where_the_step_no_longer_meets_pass_at_1(reliability):
    """At lambda = -cos / sqrt(reliability): what noise takes from p, the controller gives back."""
    path, multipliers = trained(lambda step: -0.3, reliability, held)
    assert mean(path[-100:]) == pytest.approx(0, abs=0.03)
    assert mean(multipliers[-100:]) == pytest.approx(0.3 / math.sqrt(reliability), abs=0.06)
    if reliability < 1:
        fixed, _ = trained(lambda step: -0.3, reliability, lambda _, *scalars: plan_projection(*scalars, 0.2))
        assert fixed[-1] < -0.3, "a gamma that is set loses, as the direction is mostly noise"


def test_it_releases_when_the_conflict_is_gone():
    path, multipliers = trained(lambda step: -0.3 if step < 200 else 0.05, 1.0, held)
    assert mean(multipliers[100:200]) > 0.2
    assert mean(multipliers[-50:]) < 0.02
    assert min(path[50:]) > -0.05


def test_lambda_is_the_coefficient_of_the_direction():
    for hold, longest in ((4.0, 4.0), (0.7, 1.0)):
        engine = Engine([1.0, -2.0], 1024.0)
        made = guard(engine)
        made.protected, made.hold = [torch.tensor([0.0, 3.0])], hold
        engine.before_step()
        expected = (torch.tensor([1.0, -2.0]) + hold * math.sqrt(5) * torch.tensor([0.0, 1.0])) / longest
        torch.testing.assert_close(engine.parts[0] / 1024, expected)
    made.hold = 0.0
    engine.before_step()
    torch.testing.assert_close(engine.parts[0] / 1024, expected)


def run(folder, resume=None, **args):
    trainer = tiny_lm_trainer(folder, max_steps=6, learning_rate=2e-3, max_grad_norm=0.5, **args)
    found = guard_of(trainer, gate="conflict", **HOLD)
    multipliers = Multipliers(lambda: found._mitigator.steps, None)
    trainer.add_callback(multipliers)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, multipliers.seen, found


def test_a_plain_trainer_is_held_and_resumed(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 3}
    whole, seen, first = run(tmp_path / "whole", **args)
    assert seen[0] == seen[1] == 0.5
    assert len(set(seen)) > 1, "the fixture must move lambda"
    rows = [row for row in whole.state.log_history if "passk_guard/train_cosine" in row]
    assert len(rows) == 6, "whatever the gate of project"
    for row, lam in zip(rows, seen, strict=True):
        cosine, before = row["passk_guard/train_cosine"], row["passk_guard/grad_norm_before"]
        after = before * math.sqrt(1 + 2 * lam * cosine + lam**2) / max(1, lam)
        assert row["passk_guard/grad_norm_after"] == pytest.approx(after, rel=1e-5)
        assert row["passk_guard/mitigated"] == float(lam > 0)
    events = [e for e in journal(tmp_path / "whole") if e["event"] == "change"]
    assert [e["hold_multiplier"] for e in events] == seen[2::2]
    assert [e["prompts"] for e in events] == [24 // MEASURED_OF] * 2, "the others steer"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "second" / "checkpoint-3")
    second, rest, again = run(tmp_path / "second", str(tmp_path / "second" / "checkpoint-3"), **args)
    assert rest == seen[3:]
    assert again.memory.hold == first.memory.hold
    assert same(parameters(whole), parameters(second))
