"""mitigation="hold" in real trainers: what the advantages become, what moves lambda, and what stays."""

import logging
import shutil

import pytest
import torch
from transformers import TrainerCallback

from passk_guard import GuardConfig, GuardError, PassKObjective, passk_advantages
from passk_guard.callback.state import Memory, load_memory, save_memory
from passk_guard.mitigation import HoldState, hold_guard
from passk_guard.mitigation.objective import HeldAdvantages
from tests.callback.test_guard import CONFIG, guard_of, journal
from tests.helpers.tiny import digit_reward, tiny_grpo_trainer, tiny_lm_trainer, tiny_rloo_trainer
from tests.mitigation.test_floor_guard import parameters, same

MAKE = {"grpo": tiny_grpo_trainer, "rloo": tiny_rloo_trainer}
OWN = {"grpo": {"scale_rewards": "none", "loss_type": "dr_grpo"}, "rloo": {}}
HOLD = {"mitigation": "hold", "instruments": "change", "refresh_steps": 2}


class Multipliers(TrainerCallback):
    """Lambda in force at every step; or, given a list, what sets it."""

    def __init__(self, target, replay):
        self.target, self.replay, self.seen = target, replay, []

    def on_step_begin(self, args, state, control, **_):
        if self.replay is not None:
            self.target().hold = self.replay[state.global_step]
        self.seen.append(self.target().hold)


def run(folder, kind="grpo", *, objective=True, guard=None, replay=None, steps=6, resume=None, **args):
    trainer = MAKE[kind](folder, max_steps=steps, **OWN[kind] | args)
    found = None if guard is None else guard_of(trainer, **guard)
    by_hand = PassKObjective(trainer, k=CONFIG["k"]) if objective else None
    if by_hand is None and found is None:
        by_hand = HeldAdvantages(trainer, 0, 1.0)
    multipliers = Multipliers(lambda: by_hand or found._mitigator.hold._target, replay)
    trainer.add_callback(multipliers)
    if by_hand is not None:
        by_hand.install()
    trainer.train(resume_from_checkpoint=resume)
    if by_hand is not None:
        by_hand.remove()
    return trainer, multipliers.seen, found


@pytest.mark.parametrize(("kind", "objective"), [("grpo", True), ("grpo", False), ("rloo", False)])
def test_the_run_is_the_one_with_these_multipliers_set_by_hand(kind, objective, tmp_path):
    held, seen, guard = run(tmp_path / "held", kind, objective=objective, guard=HOLD)
    assert seen[0] == 0.5
    assert len(set(seen)) > 1, "the fixture must move lambda"
    by_hand, _, _ = run(tmp_path / "by_hand", kind, objective=objective, replay=seen)
    assert same(parameters(held), parameters(by_hand))
    plain, _, _ = run(tmp_path / "plain", kind, objective=objective, replay=[0.0] * 6)
    assert not same(parameters(held), parameters(plain))
    events = [e for e in journal(tmp_path / "held") if e["event"] == "change"]
    assert [e["hold_multiplier"] for e in events] == seen[2::2]
    assert events[-1]["hold_cause"] == guard.memory.hold.cause
    assert {"hold_trusted", "hold_above_level", "hold_above_level_se"} <= events[-1].keys()
    assert any("passk_guard/hold_multiplier" in row for row in held.state.log_history)


@pytest.mark.parametrize("kind", MAKE)
def test_pass_at_1_advantages_are_added_to_the_trainers_own(kind, tmp_path):
    trainer = MAKE[kind](tmp_path, **OWN[kind])
    inputs = [{"prompt": "1+1=", "answer": "2"}] * 4 + [{"prompt": "1+2=", "answer": "3"}] * 4
    logged = []

    def advantages():
        trainer.model.train()
        torch.manual_seed(0)
        found = trainer._generate_and_score_completions(inputs)["advantages"]
        logged.append(list(trainer._logs["advantages"])[-len(found) :])
        return found

    own = advantages()
    held = HeldAdvantages(trainer, 0, 1.0).install()
    assert torch.equal(advantages(), own), "lambda is 0 at first"
    for hold, longest in ((0.7, 1.0), (4.0, 4.0)):
        held.hold = hold
        added = passk_advantages((held._rewards.view(-1, 4) >= 1).float(), 1).view(-1)
        expected = (own + hold * added) / longest
        assert torch.allclose(advantages(), expected)
        assert logged[-1] == pytest.approx(expected.tolist()), "the table of completions shows what was used"
    held.remove()
    assert torch.equal(advantages(), own)
    held.hold = 1.0
    assert not held.advantages(torch.full((8,), float("nan")), 4).any(), "no reward, no advantage"


def test_the_first_lambda_is_from_prompts_that_its_window_leaves_out(tmp_path, monkeypatch):
    asked = []

    def first(probe, k):
        asked.append(list(probe.prompt_keys))
        return 0.9

    monkeypatch.setattr(hold_guard, "first_multiplier", first)
    _, seen, guard = run(tmp_path, guard=HOLD | {"instruments": "both"}, steps=5)
    assert seen[:2] == [0.9, 0.9]
    assert len(asked) == 1
    events = [e for e in journal(tmp_path) if e["event"] == "change"]
    assert [e["prompts"] for e in events] == [6, 12], "half of the first sample, and all of the second"
    assert len(asked[0]) == 6
    assert not {guard._change.prompt(key) for key in asked[0]} & {p for p, _ in events[0]["lost"] + events[0]["gained"]}


def test_failed_checks_hold_lambda_and_then_move_it_to_what_was_learned(tmp_path):
    calls = []

    def breaks_later(completions, **_):
        calls.append(len(completions))
        if len(calls) > 2:
            raise RuntimeError("the verifier is down")
        return digit_reward(completions)

    _, seen, guard = run(tmp_path, guard=HOLD | {"correct": breaks_later}, steps=9)
    assert guard.memory.failures == 3
    trusted = guard.memory.hold.trusted
    assert seen[2] != trusted
    assert seen[4] == seen[2]
    assert seen[6] == pytest.approx((seen[2] + trusted) / 2)
    assert seen[8] == pytest.approx((seen[6] + trusted) / 2)


def test_lambda_is_resumed(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 3}
    whole, seen, guard = run(tmp_path / "whole", guard=HOLD, **args)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "second" / "checkpoint-3")
    checkpoint = str(tmp_path / "second" / "checkpoint-3")
    assert load_memory(tmp_path / "second" / "checkpoint-3").hold.multiplier == seen[2]
    second, rest, again = run(tmp_path / "second", guard=HOLD, resume=checkpoint, **args)
    assert rest == seen[3:]
    assert again.memory.hold == guard.memory.hold
    assert same(parameters(whole), parameters(second))


def test_the_state_in_a_checkpoint(tmp_path):
    for hold in (None, HoldState(0.5, 0.5, cause="start"), HoldState(1.0, 0.7, -0.1, 0.02, 0.9, 0.3, 2, "held")):
        save_memory(Memory(hold=hold), tmp_path)
        assert load_memory(tmp_path).hold == hold
    save_memory(Memory(hold=HoldState(multiplier=-1.0)), tmp_path)
    assert load_memory(tmp_path) is None


def test_a_level_of_the_user_and_a_tolerance(tmp_path):
    """Far above what the model can do, lambda grows; far below, it is released."""
    high = run(tmp_path / "high", guard=HOLD | {"hold_level": 0.9})[1]
    assert high[2] > 2
    low = run(tmp_path / "low", guard=HOLD | {"hold_level": 0.9, "hold_tolerance": 0.89})[1]
    assert low[2] == 0


def other_reward(completions, **_):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("make", "correct", "words"),
    [(tiny_lm_trainer, digit_reward, "instruments='both'"), (tiny_grpo_trainer, other_reward, "'digit_reward'")],
)
def test_where_nothing_can_be_held(make, correct, words, tmp_path):
    trainer = make(tmp_path, max_steps=1)
    guard_of(trainer, correct=correct, **HOLD)
    with pytest.raises(GuardError) as error:
        trainer.train()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "training_batch", "instruments": "both"}, "'training_batch'"),
        ({"instruments": "angle"}, "'angle'"),
        ({"hold_tolerance": 1.0}, "hold_tolerance"),
        ({"hold_level": 0.0}, "hold_level"),
    ],
)
def test_settings_that_do_not_fit(settings, words):
    with pytest.raises(GuardError) as error:
        GuardConfig.of(HOLD | settings)
    assert words in str(error.value)


def test_auto_holds_where_there_are_advantages(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "passk_guard"):
        _, seen, _ = run(tmp_path, objective=False, guard=HOLD | {"mitigation": "auto", "instruments": "both"}, steps=1)
    assert seen == [0.5]
    assert "auto: hold" in caplog.text
    assert "no PassKObjective of 0/1 rewards is installed" in caplog.text


def test_pass_at_1_advantages_are_added_to_those_of_max_at_k(tmp_path):
    trainer = MAKE["grpo"](tmp_path, **OWN["grpo"])
    own = PassKObjective(trainer, k=2, threshold=None).install()
    held = HeldAdvantages(trainer, 0, 1.0).install()
    held.hold = 0.7
    trainer.model.train()
    inputs = [{"prompt": "1+1=", "answer": "2"}] * 4 + [{"prompt": "1+2=", "answer": "3"}] * 4
    found = trainer._generate_and_score_completions(inputs)["advantages"]
    assert found.any()
    torch.testing.assert_close(found, own.advantages(own._rewards, 4) + held.advantages(held._rewards, 4))
    held.remove()
    own.remove()
