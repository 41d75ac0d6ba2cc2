"""Reward functions of every kind, the well-behaved and the others."""

import asyncio
import functools
import math

import numpy as np
import pytest
import torch

from passk_guard.probe.records import Rollouts
from passk_guard.probe.verifier import Verifier, resolve_verifier
from passk_guard.utils.errors import FailedRefresh, GuardError


def rollouts(completions, prompt_index=None, rows=None):
    count = len(completions)
    rows = rows or [{"prompt": f"p{i}", "answer": str(i)} for i in range(count)]
    return Rollouts(
        rows=rows,
        prompt_index=prompt_index or list(range(count)),
        prompt_ids=[[1]] * count,
        completion_ids=[[i] for i in range(count)],
        completions=completions,
        num_prompts=count,
    )


def returning(value):
    return lambda completions, **_: value


def correct(function, completions=("0", "x", "2"), threshold=1.0, **kwargs):
    return Verifier(function, threshold=threshold).score(rollouts(list(completions), **kwargs)).correct.tolist()


def exact(completions, answer, **_):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def strict(completions, answer, **_):
    if any(c == "x" for c in completions):
        raise ValueError("cannot parse x")
    return exact(completions, answer)


async def exact_later(completions, answer, **_):
    await asyncio.sleep(0)
    return exact(completions, answer)


async def strict_later(completions, answer, **_):
    await asyncio.sleep(0)
    return strict(completions, answer)


class ExactLater:
    async def __call__(self, completions, answer, **_):
        return await exact_later(completions, answer)


@pytest.mark.parametrize("function", [exact, exact_later, ExactLater(), functools.partial(exact, unused=1)])
def test_correct_or_not(function):
    outcomes = Verifier(function).score(rollouts(["0", "x", "2"]))
    assert outcomes.correct.dtype == torch.int8
    assert outcomes.correct.tolist() == [1, 0, 1]
    assert (outcomes.failures, outcomes.reason, outcomes.best_reward) == (0, None, 1.0)


@pytest.mark.parametrize(
    ("rewards", "threshold", "expected"),
    [
        ([1.0, 0.99, 2], 1.0, [1, 0, 1]),
        ([True, False, None], 1.0, [1, 0, -1]),
        ([math.nan, math.inf, -math.inf], 1.0, [-1, 1, 0]),
        ([np.float32(0.9), 0.9, np.bool_(True)], 0.9, [1, 1, 1]),
        (torch.tensor([1.0, 0.0, math.nan]), 0.5, [1, 0, -1]),
        (np.array([1.0, 0.0, 0.5]), 0.5, [1, 0, 1]),
        ((0.0, -1.0, -2.0), -1.0, [1, 1, 0]),
    ],
)
def test_rewards_of_every_type(rewards, threshold, expected):
    assert correct(returning(rewards), threshold=threshold) == expected


@pytest.mark.parametrize("function", [strict, strict_later])
def test_an_exception_fails_its_sample_only(function):
    outcomes = Verifier(function).score(rollouts(["0", "x", "1"]))
    assert outcomes.correct.tolist() == [1, -1, 0]
    assert outcomes.failures == 1
    assert outcomes.reason == "ValueError: cannot parse x"


@pytest.mark.parametrize("function", [strict, strict_later])
def test_an_exception_on_each_fails_the_refresh(function):
    with pytest.raises(FailedRefresh, match=r"raised on each of 2 samples, first ValueError: cannot parse x"):
        Verifier(function).score(rollouts(["x", "x"]))


def test_a_cancelled_call_is_a_failure_and_not_the_end_of_training():
    async def cancelled(completions, **_):
        raise asyncio.CancelledError

    with pytest.raises(FailedRefresh, match="cancelled"):
        Verifier(cancelled).score(rollouts(["x"]))


def test_the_user_can_interrupt():
    def interrupted(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Verifier(interrupted).score(rollouts(["x"]))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "returned 1 rewards; expected a list of 3"),
        ([1.0] * 5, "returned 5 rewards; expected a list of 3"),
        ((x for x in [1.0] * 5), "returned 4 rewards"),
        (torch.tensor(1.0), r"returned Tensor tensor\(1.\)"),
        ({0.1, 0.2, 0.3}, "returned set"),
        ([1.0, 10**400, 0.0], "of type int"),
        (1.0, "returned float 1.0; expected"),
        (None, "returned NoneType None"),
        ("yes", "returned str 'yes'"),
        ({"a": 1}, "returned dict"),
        ([1.0, "1.0", 0.0], "a reward '1.0' of type str"),
        ([[1.0], [0.0], [0.0]], r"a reward \[1.0\] of type list"),
        (torch.zeros(3, 2), "of type Tensor"),
    ],
)
def test_what_is_no_list_of_rewards_fails_the_refresh(result, message):
    with pytest.raises(FailedRefresh, match=message):
        correct(returning(result))


def test_works_inside_a_running_loop():
    async def notebook():
        return correct(exact_later)

    assert asyncio.run(notebook()) == [1, 0, 1]


def test_the_function_gets_what_trl_gives_it():
    seen = {}

    def record(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
        seen.update(locals())
        log_extra("column", ["a"] * 2)
        log_metric("name", 0.5)
        return [1.0, 0.0]

    Verifier(record).score(rollouts(["a", "b"]), trainer_state="state")
    assert seen["prompts"] == ["p0", "p1"]
    assert seen["completions"] == ["a", "b"]
    assert seen["completion_ids"] == [[0], [1]]
    assert seen["answer"] == ["0", "1"]
    assert seen["trainer_state"] == "state"
    assert seen["kwargs"] == {}


def test_without_kwargs_it_gets_what_it_names():
    def plain(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    assert correct(plain) == [1, 0, 1]
    assert Verifier(plain).required_columns == ("answer",)
    assert Verifier(exact).required_columns == ("answer",)
    assert Verifier(returning([])).required_columns == ()


def test_the_function_cannot_change_the_rows():
    rows = [{"prompt": [{"role": "user", "content": "p"}], "answer": ["a"]}] * 2
    completions = [[{"role": "assistant", "content": "c"}] for _ in rows]

    def vandal(prompts, completions, answer, **_):
        for prompt, completion, column in zip(prompts, completions, answer, strict=True):
            prompt[0]["content"] = completion[0]["content"] = "changed"
            column.append("changed")
        return [1.0] * len(prompts)

    given = rollouts(completions, rows=rows)
    Verifier(vandal).score(given)
    assert rows[0] == {"prompt": [{"role": "user", "content": "p"}], "answer": ["a"]}
    assert completions == [[{"role": "assistant", "content": "c"}]] * 2


def test_fillers_are_not_scored():
    calls = []

    def record(completions, **_):
        calls.append(completions)
        return [1.0] * len(completions)

    assert correct(record, ["a", "b", "c"], prompt_index=[0, -1, 1]) == [1, -1, 1]
    assert correct(record, ["a"], prompt_index=[-1]) == [-1]
    assert calls == [["a", "c"]]


def test_the_best_reward_is_kept():
    assert Verifier(returning([0.2, None, 0.7])).score(rollouts(["a", "b", "c"])).best_reward == pytest.approx(0.7)
    assert Verifier(returning([None])).score(rollouts(["a"])).best_reward is None


def test_rewards_already_computed():
    assert Verifier(exact).outcomes(torch.tensor([1.0, math.nan, 0.0])).correct.tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("function", "threshold", "message"),
    [(torch.nn.Linear(1, 1), 1.0, "reward model Linear"), (3, 1.0, "found int"), (exact, math.nan, "finite")],
)
def test_misuse(function, threshold, message):
    with pytest.raises(GuardError, match=message):
        Verifier(function, threshold=threshold)


def test_resolving_what_the_user_means():
    trainers = ([exact, torch.nn.Linear(1, 1), strict, strict], ["exact", "model", "twice", "twice"])
    assert resolve_verifier("exact", *trainers, threshold=0.5).function is exact
    assert resolve_verifier("exact", *trainers, threshold=0.5).threshold == 0.5
    assert resolve_verifier(strict).function is strict
    verifier = Verifier(exact)
    assert resolve_verifier(verifier) is verifier
    assert verifier.name == "exact"
    with pytest.raises(GuardError, match=r"\('exact', 'model', 'twice', 'twice'\); found 'acc', which names 0"):
        resolve_verifier("acc", *trainers)
    with pytest.raises(GuardError, match="names 2"):
        resolve_verifier("twice", *trainers)
    with pytest.raises(GuardError, match="reward model"):
        resolve_verifier("model", *trainers)
