"""`hold_metric`: the mean of another reward is held, by its own advantages, on its own scale."""

import shutil

import pytest
import torch

from passk_guard import GuardConfig, GuardError, PassKObjective
from passk_guard.callback.state import load_memory
from passk_guard.mitigation.objective import HeldAdvantages
from tests.callback.test_guard import CONFIG, guard_of, journal
from tests.helpers.tiny import digit_reward, tiny_grpo_trainer
from tests.mitigation.test_floor_guard import parameters, same
from tests.mitigation.test_hold_guard import HOLD, MAKE, OWN, Multipliers


def brevity(completions, **_):
    """From -8 to 0 for a completion of four tokens: no [0, 1]."""
    return [-2.0 * sum(ch.isalpha() for ch in text) for text in completions]


METRIC = HOLD | {"hold_metric": "brevity", "hold_level": 0.0}


def run(folder, kind="grpo", *, objective=False, guard=None, replay=None, unit=1.0, steps=6, resume=None, **args):
    both = {"reward_funcs": [digit_reward, brevity], "reward_weights": [1.0, 0.0]}
    trainer = MAKE[kind](folder, max_steps=steps, **OWN[kind] | both | args)
    installed = PassKObjective(trainer, k=CONFIG["k"], correct="digit_reward").install() if objective else None
    found = by_hand = None
    if guard is None:
        by_hand = HeldAdvantages(trainer, 1, None).install()
        by_hand.unit = unit
    else:
        found = guard_of(trainer, **guard)
    multipliers = Multipliers(lambda: by_hand or found._mitigator.hold._target, replay)
    trainer.add_callback(multipliers)
    trainer.train(resume_from_checkpoint=resume)
    if installed is not None:
        installed.remove()
    return trainer, multipliers.seen, found


@pytest.mark.parametrize(("kind", "objective"), [("grpo", True), ("rloo", False)])
def test_the_run_is_the_one_with_these_multipliers_set_by_hand(kind, objective, tmp_path):
    held, seen, guard = run(tmp_path / "held", kind, objective=objective, guard=METRIC)
    curve = guard.memory.change.held
    assert (curve.name, seen[0]) == ("brevity", pytest.approx(0.5 / curve.scale))
    assert 2 < curve.scale <= 8, "the range of the first sample"
    assert seen[2] > seen[0], "the level asked for is above what the model does"
    by_hand, _, _ = run(tmp_path / "by_hand", kind, objective=objective, replay=seen, unit=curve.scale)
    assert same(parameters(held), parameters(by_hand))
    events = [e for e in journal(tmp_path / "held") if e["event"] == "change"]
    assert [e["hold_multiplier"] for e in events] == seen[2::2]
    assert "brevity is short" in events[0]["hold_cause"]
    first, last = events[0], events[-1]
    assert -8 < first["hold_metric_level"] < 0
    assert last["hold_above_level"] == pytest.approx(last["hold_metric_level"]), "above a level of 0"
    assert last["hold_metric_change_se"] < last["hold_metric_level_se"], "the windows are precise"
    assert any("passk_guard/hold_metric_level" in row for row in held.state.log_history)


def test_advantages_of_the_metric_are_added_to_those_of_training(tmp_path):
    trainer = tiny_grpo_trainer(tmp_path, reward_funcs=[digit_reward, brevity], **OWN["grpo"])
    trainer.model.train()
    inputs = [{"prompt": "1+1=", "answer": "2"}] * 4 + [{"prompt": "1+2=", "answer": "3"}] * 4

    def advantages():
        torch.manual_seed(0)
        return trainer._generate_and_score_completions(inputs)["advantages"]

    own = advantages()
    held = HeldAdvantages(trainer, 1, None).install()
    held.hold = 0.7
    found, f = advantages(), held._rewards.view(2, 4)
    assert f.std() > 0
    expected = own + 0.7 * (f - (f.sum(1, keepdim=True) - f) / 3).view(-1)
    torch.testing.assert_close(found, expected)
    missing = torch.tensor([1.0, torch.nan, 4.0, torch.nan])
    torch.testing.assert_close(held.advantages(missing, 4), 0.7 * torch.tensor([-3.0, 0, 3, 0]))
    held.remove()


def test_the_metric_is_resumed_and_another_one_begins_anew(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 3}
    whole, seen, guard = run(tmp_path / "whole", guard=METRIC, **args)
    for name in ("second", "other"):
        shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / name / "checkpoint-3")
    checkpoint = tmp_path / "second" / "checkpoint-3"
    assert load_memory(checkpoint).change.metric.scale == guard.memory.change.metric.scale
    second, rest, again = run(tmp_path / "second", guard=METRIC, resume=str(checkpoint), **args)
    assert rest == seen[3:]
    assert (again.memory.hold, again.memory.change) == (guard.memory.hold, guard.memory.change)
    assert same(parameters(whole), parameters(second))
    other = METRIC | {"hold_metric": "digit_reward", "hold_level": None}
    _, rest, found = run(
        tmp_path / "other", guard=other, resume=str(tmp_path / "other" / "checkpoint-3"), steps=5, **args
    )
    assert rest == [0.0, 0.5], "nothing is known of it before the next sample"
    assert (found.memory.change.metric.name, found.memory.change.metric.scale) == ("digit_reward", 1.0)


def test_rewards_that_are_there_are_not_computed_again(tmp_path):
    calls = []

    def counted(completions, **_):
        calls.append(len(completions))
        return digit_reward(completions)

    trainer = tiny_grpo_trainer(tmp_path, max_steps=1, reward_funcs=[counted], **OWN["grpo"])
    guard = guard_of(trainer, correct="counted", **HOLD | {"hold_metric": "counted"})
    trainer.train()
    assert sorted(calls) == [8, 12 * 8], "training and one refresh"
    change = guard.memory.change
    assert change.metric.curve.now == pytest.approx(change.fused.pass_at_1.now)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hold_metric": "lenght"}, "'digit_reward', 'brevity'.; found 'lenght'.*reward_weights"),
        (
            {"hold_metric": "brevity", "mitigation": "project", "instruments": "both"},
            "mitigation='hold' for hold_metric",
        ),
    ],
)
def test_a_metric_that_cannot_be_held(settings, words, tmp_path):
    trainer = tiny_grpo_trainer(tmp_path, reward_funcs=[digit_reward, brevity])
    with pytest.raises((GuardError, ValueError), match=words):
        guard_of(trainer, **HOLD | settings)
    assert GuardConfig.of(METRIC | {"hold_tolerance": 3.0}).hold_tolerance == 3
