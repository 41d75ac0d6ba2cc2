"""mitigation="reweight", "both" and "auto" in real trainers: what the advantages become, when, and what stays."""

import itertools
import logging
import shutil

import pytest
import torch
from transformers import TrainerCallback

from passk_guard import GuardConfig, GuardError, PassKGuardCallback, PassKObjective
from passk_guard.callback.state import load_memory
from passk_guard.mitigation import FloorState, solve_floor
from passk_guard.mitigation.floor_guard import FloorGuard
from passk_guard.utils.ranks import Ranks
from tests.callback.test_guard import CONFIG, guard_of, journal
from tests.helpers.tiny import digit_reward, tiny_grpo_trainer, tiny_lm_trainer, tiny_rloo_trainer


def grpo(tmp_path, **args):
    return tiny_grpo_trainer(tmp_path, scale_rewards="none", loss_type="dr_grpo", **args)


TRAINERS = {"grpo": grpo, "rloo": tiny_rloo_trainer}
# A cosine that random models do not reach without a floor.
REWEIGHT = {"mitigation": "reweight", "refresh_steps": 2, "floor_gamma": 0.99, "floor_max": 4.0, "probe_seed": 3}


def parameters(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Floors(TrainerCallback):
    """The floor in force at every step; or, given a list, the one that sets it."""

    def __init__(self, objective, floors=None):
        self.objective, self.replay, self.seen = objective, floors, []

    def on_step_begin(self, args, state, control, **_):
        if self.replay is not None:
            self.objective.floor = self.replay[state.global_step]
        self.seen.append(self.objective.floor)


def run(tmp_path, kind="grpo", *, guard=None, replay=None, steps=6, resume=None, **args):
    trainer = TRAINERS[kind](tmp_path, max_steps=steps, **args)
    if guard is not None:
        guard = guard_of(trainer, **guard)
    with PassKObjective(trainer, k=CONFIG["k"]) as objective:
        floors = Floors(objective, replay)
        trainer.add_callback(floors)
        trainer.train(resume_from_checkpoint=resume)
    return trainer, floors.seen, guard, objective


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_run_is_the_one_with_these_floors_set_by_hand(kind, tmp_path):
    guarded, floors, _, objective = run(tmp_path / "guarded", kind, guard=REWEIGHT)
    assert len({f for f in floors if f}) > 1, "the fixture must move the floor"
    by_hand, _, _, _ = run(tmp_path / "by_hand", kind, replay=floors)
    assert same(parameters(guarded), parameters(by_hand))
    unguarded, _, _, _ = run(tmp_path / "unguarded", kind)
    assert not same(parameters(guarded), parameters(unguarded))
    assert objective.floor is None, "the objective gets its own floor back"


def test_the_log_says_what_the_floor_is_and_why(tmp_path):
    trainer, floors, guard, _ = run(tmp_path, guard=REWEIGHT)
    events = [e for e in journal(tmp_path) if e["event"] == "refresh"]
    assert [e["floor"] for e in events] == [f or 0.0 for f in floors[::2]]
    newest = solve_floor(guard.memory.history, CONFIG["k"], gamma=0.99, largest=4.0)
    assert events[-1]["floor_solved"] == newest.floor
    assert events[-1]["floor_se"] == newest.standard_error
    assert events[-1]["weight_ratio"] == pytest.approx(CONFIG["k"] / events[-1]["floor"])
    assert events[-1]["weight_ratio_bound"] == newest.weight_ratio_bound
    assert any("passk_guard/floor" in row for row in trainer.state.log_history)


def test_a_failed_refresh_keeps_the_floor(tmp_path):
    calls = []

    def breaks_later(completions, **_):
        calls.append(len(completions))
        if len(calls) > 2:
            raise RuntimeError("the verifier is down")
        return digit_reward(completions)

    _, floors, guard, _ = run(tmp_path, guard=REWEIGHT | {"correct": breaks_later})
    assert guard.memory.failures == 1
    assert floors[2], "the fixture must have found a floor"
    assert set(floors[2:]) == {floors[2]}


def test_the_floor_moves_with_fresh_samples_and_stays_with_kept_ones(tmp_path):
    kept = {"refresh_steps": 1, "resample_refreshes": 3, "min_effective_samples": 0.01}
    _, floors, _, _ = run(tmp_path, guard=REWEIGHT | kept, steps=7)
    events = [e for e in journal(tmp_path) if e["event"] == "refresh"]
    fresh = [e["pass_at_1"] is not None for e in events]
    assert fresh == [True, False, False, True, False, False, True]
    assert [e["floor"] for e in events] == [f or 0.0 for f in floors]
    assert [e["floor_solved"] is not None for e in events] == fresh
    moved = [new != old for old, new in itertools.pairwise([0.0, *[e["floor"] for e in events]])]
    assert moved == [False, *fresh[1:]], "a floor takes effect when the window of its samples is over"


def test_the_floor_is_resumed(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 3}
    whole, floors, guard, _ = run(tmp_path / "whole", guard=REWEIGHT, **args)
    memory = load_memory(tmp_path / "whole" / "checkpoint-3")
    assert memory.floor_before.floor == pytest.approx(floors[3])
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "second" / "checkpoint-3")
    checkpoint = str(tmp_path / "second" / "checkpoint-3")
    second, rest, again, _ = run(tmp_path / "second", guard=REWEIGHT, resume=checkpoint, **args)
    assert rest == floors[3:]
    assert again.memory.floor == guard.memory.floor
    assert same(parameters(whole), parameters(second))


def test_a_training_batch_never_sets_its_own_floor(tmp_path):
    """Its floor would look at the samples it weighs; it takes effect from the next step on."""
    config = REWEIGHT | {"source": "training_batch", "refresh_steps": 1}
    trainer = grpo(tmp_path, max_steps=4)
    guard = PassKGuardCallback(trainer, correct=digit_reward, config=GuardConfig(**(CONFIG | config)))
    trainer.add_callback(guard)
    with PassKObjective(trainer, k=CONFIG["k"]) as objective:
        used, advantages = [], objective.advantages

        def watched(*args):
            used.append(objective.floor)
            return advantages(*args)

        objective.advantages = watched
        trainer.train()
    solved = [e["floor"] for e in journal(tmp_path) if e["event"] == "refresh"]
    assert used[0] is None
    assert used[1:] == [f or None for f in solved[: len(used) - 1]]


def test_a_floor_of_the_user_is_the_least(tmp_path):
    trainer = grpo(tmp_path, max_steps=6)
    guard = guard_of(trainer, **(REWEIGHT | {"floor_max": 0.01}))
    with PassKObjective(trainer, k=CONFIG["k"], floor=0.5, cap=2.0) as objective:
        floors = Floors(objective)
        trainer.add_callback(floors)
        trainer.train()
        assert guard.memory.floor.floor <= 0.01
        assert floors.seen == [0.5] * 6
    assert (objective.floor, objective.cap) == (0.5, 2.0)


def test_a_solved_floor_below_that_of_the_user_is_not_used(tmp_path):
    trainer = grpo(tmp_path, max_steps=1)
    with PassKObjective(trainer, k=CONFIG["k"], floor=0.5) as objective:
        floor = FloorGuard(objective, GuardConfig(**CONFIG), Ranks(torch.device("cpu")))
        floor.apply(FloorState(0.2, 1.0))
        assert objective.floor == 0.5
        floor.apply(FloorState(0.8, 1.0))
        assert objective.floor == 0.8
        assert floor.metrics(FloorState(0.8, 1.0))["weight_ratio"] == CONFIG["k"] / 0.8


def test_a_floor_solved_under_a_higher_cap_is_lowered_to_the_new_one(tmp_path):
    """A run may be resumed with a lower cap; a floor above it would stop the run."""
    trainer = grpo(tmp_path, max_steps=1)
    with PassKObjective(trainer, k=CONFIG["k"], floor=0.1, cap=0.5) as objective:
        FloorGuard(objective, GuardConfig(**CONFIG), Ranks(torch.device("cpu"))).apply(FloorState(0.9, 1.0))
        assert objective.floor == 0.5
        objective.advantages(torch.ones(8), 8)


def test_both_reweights_and_projects(tmp_path):
    trainer, floors, _, _ = run(tmp_path, guard=REWEIGHT | {"mitigation": "both", "gamma": 0.9})
    assert any(floors)
    assert any(row.get("passk_guard/mitigated") for row in trainer.state.log_history)


def test_auto_reweights_where_pass_at_1_is_not_measured(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "passk_guard"):
        _, floors, _, _ = run(tmp_path, guard=REWEIGHT | {"mitigation": "auto", "instruments": "angle"})
    assert any(floors)
    assert "auto: reweight" in caplog.text


def test_auto_projects_elsewhere(tmp_path, caplog):
    trainer = tiny_lm_trainer(tmp_path, max_steps=2)
    guard_of(trainer, mitigation="auto", gamma=0.9)
    with caplog.at_level(logging.INFO, "passk_guard"):
        trainer.train()
    assert "auto: project" in caplog.text
    assert any("passk_guard/train_cosine" in row for row in trainer.state.log_history)


@pytest.mark.parametrize("mitigation", ["reweight", "both"])
def test_nothing_to_reweight_is_an_error(mitigation, tmp_path):
    trainer = grpo(tmp_path, max_steps=1)
    guard_of(trainer, mitigation=mitigation)
    with pytest.raises(GuardError, match="PassKObjective"):
        trainer.train()
    with PassKObjective(trainer, k=CONFIG["k"], threshold=None), pytest.raises(GuardError, match="of 0/1 rewards"):
        trainer.train()


def test_auto_without_any_way_is_an_error(tmp_path):
    trainer = grpo(tmp_path, max_steps=1)
    config = GuardConfig(**(CONFIG | {"mitigation": "auto", "source": "training_batch"}))
    trainer.add_callback(PassKGuardCallback(trainer, correct=digit_reward, config=config))
    with pytest.raises(GuardError, match="Install one"):
        trainer.train()


def test_another_k_is_an_error(tmp_path):
    trainer = grpo(tmp_path, max_steps=1)
    guard_of(trainer, mitigation="reweight")
    with PassKObjective(trainer, k=2), pytest.raises(GuardError, match=r"k=4.*k=2"):
        trainer.train()


def test_a_cap_alone_is_warned_about(tmp_path, caplog):
    trainer = grpo(tmp_path, max_steps=1, num_generations=8)
    PassKObjective(trainer, k=4, floor=0.5, cap=2.0)
    assert not caplog.records
    PassKObjective(trainer, k=4, cap=2.0)
    assert "does not protect pass@1" in caplog.text
    with pytest.raises(GuardError, match="`floor` <= `cap`"):
        PassKObjective(trainer, k=4, floor=3.0, cap=2.0)
    for bounds in ({"cap": 0.0}, {"floor": -1.0}):  # else the run would stop at its first refresh
        with pytest.raises(GuardError, match="`cap` > 0"):
            PassKObjective(trainer, k=4, **bounds)
