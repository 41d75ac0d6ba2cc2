"""Tools, environments and rollout functions: the probe's trajectories are those of training, and leave no trace."""

import copy
import json
import logging
import time

import pytest
import torch

import passk_guard
from passk_guard import PassKGuardCallback
from passk_guard.probe.samplers import BatchTap, TRLSampler
from passk_guard.probe.samplers.training_batch import takes_turns
from passk_guard.utils.errors import FailedRefresh, GuardError
from tests.helpers.tools import SUPPORTED, Counter, chat_probe, double, last_turn, tool_trainer

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="this TRL keeps its tools in another way, and is refused")
SETTINGS = {"k": 2, "num_samples": 4, "probe_prompts": 12, "refresh_steps": 1, "sketch_dim": 512}


def text_of(trainer, ids):
    return trainer.processing_class.decode(ids)


def test_a_trajectory_has_the_tools_words_masked(tmp_path, monkeypatch):
    trainer = tool_trainer(tmp_path, monkeypatch)
    before = {name: copy.deepcopy(trainer._metrics[name]) for name in trainer._metrics}
    sampler = TRLSampler(trainer)
    samples = sampler.sample(chat_probe(6), 8, seed=0)
    again = sampler.sample(chat_probe(6), 8, seed=0)
    assert samples == again
    called = [i for i, messages in enumerate(samples.completions) if len(messages) > 1]
    assert 3 < len(called) < 48
    for i, (ids, mask, messages) in enumerate(
        zip(samples.completion_ids, samples.policy_masks, samples.completions, strict=True)
    ):
        own = [text_of(trainer, [t]) for t, m in zip(ids, mask, strict=True) if m]
        result = text_of(trainer, [t for t, m in zip(ids, mask, strict=True) if not m])
        said = "".join(m["content"] for m in messages if m["role"] == "assistant")
        assert "".join(own).replace("<eos>", "").replace("<unk>", "") in said or "<" in "".join(own)
        assert ("<|system|>double" in result) == (i in called)
        for message in (m for m in messages if m["role"] == "tool"):
            assert message["content"] in result.replace("<unk>", "'") or "{" in message["content"]
    assert {name: dict(trainer._metrics[name]) for name in before} == {name: dict(before[name]) for name in before}
    assert not {"_sync_tool_dicts", "_async_tool_dicts", "_batch_environments"} & set(vars(trainer))


@pytest.fixture
def fresh_counter():
    Counter.made = Counter.closed = 0


def trained(trainer, guard=None):
    if guard is not None:
        guard(trainer)
    trainer.train()
    rows = [{k: v for k, v in row.items() if k in ("loss", "grad_norm", "reward")} for row in trainer.state.log_history]
    return rows, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def events(folder, kind):
    found = map(json.loads, (folder / "passk_guard.jsonl").open())
    return [event for event in found if event["event"] == kind]


def two_turns(prompts, trainer):
    """A rollout function: one turn of the model, three tokens of the world, and a column for the reward."""
    ids, _, _ = trainer._tokenize_prompts(prompts)
    own, _ = trainer._generate_single_turn(ids, None, {}, trainer.num_generations)
    own = [list(c)[:6] for c in own]
    world = [9, 10, 11]
    return {
        "prompt_ids": ids,
        "completion_ids": [c + world for c in own],
        "logprobs": None,
        "env_mask": [[1] * len(c) + [0] * 3 for c in own],
        "length": [len(c) for c in own],
    }


def by_length(completions, length, **_):
    return [float(n % 2) for n in length]


@pytest.mark.parametrize("kind", ["tools", "environment", "rollout"])
@pytest.mark.parametrize("source", ["held_out", "training_batch"])
def test_observing_changes_nothing_and_measures_both(kind, source, tmp_path, monkeypatch, fresh_counter, caplog):
    args = {
        "tools": {},
        "environment": {"environment_factory": Counter, "reward_funcs": []},
        "rollout": {"rollout_func": two_turns, "reward_funcs": by_length},
    }[kind]
    correct = {"tools": last_turn, "environment": "Counter", "rollout": by_length}[kind]
    plain = trained(tool_trainer(tmp_path / "plain", monkeypatch, **args))
    made = Counter.made
    probe = {"probe": chat_probe(12)} if source == "held_out" else {"source": source}

    def guard(trainer):
        passk_guard.watch(trainer, correct=correct, **probe, **SETTINGS)

    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        guarded = trained(tool_trainer(tmp_path / "guarded", monkeypatch, **args), guard)
    assert guarded[0] == plain[0]
    assert all(torch.equal(guarded[1][name], plain[1][name]) for name in plain[1])
    assert not events(tmp_path / "guarded", "failed_refresh"), events(tmp_path / "guarded", "failed_refresh")
    assert len(events(tmp_path / "guarded", "refresh")) == 3
    if source == "held_out":
        assert len(events(tmp_path / "guarded", "change")) == 2
        assert ": what they do outside, they do for it too" in caplog.text
        if kind == "environment":
            assert (Counter.made, Counter.closed) == (2 * made + 3 * 48, 3 * 48), "as many as completions, all closed"


def test_a_tool_that_hangs_is_stopped_and_one_that_raises_answers(tmp_path, monkeypatch):
    def slow(digit: int) -> int:
        """Take long.

        Args:
            digit: any.
        """
        if digit == 0:
            raise ValueError("no zeros")
        time.sleep(60)

    trainer = tool_trainer(tmp_path, monkeypatch, tools=[slow], max_completion_length=96)
    sampler = TRLSampler(trainer, tool_timeout=0.01)
    samples = sampler.sample(chat_probe(4), 8, seed=0)
    answers = [m["content"] for messages in samples.completions for m in messages if m["role"] == "tool"]
    assert any("0.01 s" in answer for answer in answers), answers


class Broken(Counter):
    """The numbers of those that fail, counted from when the trainer was there: when made, when reset, or for ever."""

    fails, before = {}, 0

    def __init__(self):
        super().__init__()
        number = Counter.made - Broken.before
        self.due = {name for name, numbers in Broken.fails.items() if number in numbers}
        if "made" in self.due:
            raise OSError("no room")

    def reset(self, probe=False, **row):
        if probe and "hang" in self.due:
            time.sleep(60)
        if probe and "reset" in self.due:
            raise OSError("no world")
        return super().reset(**row)


@pytest.mark.parametrize(
    ("fails", "remark"),
    [
        (
            {"made": {2}, "reset": {3, 9}},
            "3 samples have no reward (an environment could not be made: OSError: no room)",
        ),
        (
            {"reset": range(2, 6)},
            "4 samples have no reward (an environment could not be reset: OSError: no world); 1 prompts",
        ),
        ({"reset": range(99)}, "an environment could not be reset: OSError: no world, and so each of 48"),
        ({"hang": {3}}, "the reset of an environment was still running after 0.05 s"),
    ],
)
def test_an_environment_that_fails_costs_its_sample(fails, remark, tmp_path, monkeypatch, fresh_counter):
    trainer = tool_trainer(tmp_path, monkeypatch, environment_factory=Broken, reward_funcs=[], max_steps=1)
    monkeypatch.setattr(Broken, "fails", fails)
    monkeypatch.setattr(Broken, "before", Counter.made)
    settings = SETTINGS | {"verifier_timeout": 0.05} if "hang" in fails else SETTINGS
    guard = passk_guard.watch(trainer, chat_probe(12, probe=True), "Broken", **settings)
    trainer.train()
    [event] = events(tmp_path, "refresh") + events(tmp_path, "failed_refresh")
    assert remark in (event.get("remark") or event["reason"])
    if event["event"] == "refresh":
        assert guard.memory.history[0].num_samples.sum() == 48 - sum(map(len, fails.values())) - ("prompts" in remark)
    made = 8 if "hang" in fails else 48 - len(fails.get("made", ()))  # 8 in a call of the trainer's generation
    assert Counter.closed == made


def test_a_rollout_function_without_a_mask_is_told_what_to_return(tmp_path, monkeypatch):
    rollout = lambda p, t: {k: v for k, v in two_turns(p, t).items() if k != "env_mask"}  # noqa: E731
    sampler = TRLSampler(tool_trainer(tmp_path, monkeypatch, rollout_func=rollout))
    with pytest.raises(FailedRefresh, match="`rollout_func` returned no `env_mask`: return beside"):
        sampler.sample(chat_probe(3), 2, seed=0)


def test_a_row_names_its_environment(tmp_path, monkeypatch):
    class Other(Counter):
        def get_reward(self):
            return 1.0

    trainer = tool_trainer(tmp_path, monkeypatch, environment_factory={"a": Counter, "b": Other}, reward_funcs=[])
    sampler = TRLSampler(trainer)
    rows = [row | {"environment": "ab"[i % 2]} for i, row in enumerate(chat_probe(4))]
    kinds = [type(one) for one in sampler.sample(rows, 2, seed=0).columns["environments"]]
    assert kinds == [Counter, Counter, Other, Other] * 2
    with pytest.raises(GuardError, match=r"one of \['a', 'b'\]; found None"):
        sampler.check_lengths(chat_probe(4))


def test_a_masked_training_batch_is_refused(tmp_path, monkeypatch):
    trainer = tool_trainer(tmp_path, monkeypatch, mask_truncated_completions=True)
    assert takes_turns(trainer)
    with pytest.raises(GuardError, match="hides what the policy sampled"):
        BatchTap(trainer, print)
    PassKGuardCallback(trainer, chat_probe(12), last_turn, k=2, num_samples=4)
    assert double(2) == 4


@pytest.mark.parametrize("mitigation", ["hold", "reweight"])
def test_rewards_of_an_environment_steer(tmp_path, monkeypatch, fresh_counter, mitigation):
    extra = {"environment_factory": Counter, "reward_funcs": [], "scale_rewards": "none", "num_generations": 4}
    trainer = tool_trainer(tmp_path, monkeypatch, **extra)
    settings = SETTINGS | {"mitigation": mitigation}
    passk_guard.watch(trainer, chat_probe(24), "Counter", **settings)
    seen = []
    with passk_guard.PassKObjective(trainer, k=2, correct="Counter") as objective:
        advantages = objective.advantages
        monkeypatch.setattr(objective, "advantages", lambda r, n: seen.append((r, found := advantages(r, n))) or found)
        trainer.train()
    assert len(events(tmp_path, "refresh")) == 3
    assert {float(reward) for rewards, _ in seen for reward in rewards} == {0.0, 1.0}, "of the environments"
    logged = [row for row in trainer.state.log_history if "loss" in row]
    if mitigation == "hold":
        held = [row["passk_guard/hold_multiplier"] for row in logged]
        assert all(held)
        for (rewards, found), multiplier in zip(seen, held, strict=True):
            wanted = passk_guard.passk_advantages(rewards.view(-1, 4), 2, hold=multiplier)
            torch.testing.assert_close(found, wanted.view(-1))
    else:
        assert any("passk_guard/floor" in row for row in logged)
