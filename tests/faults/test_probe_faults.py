"""Faults of the probe: the refresh is void, the reason is said, and training is that of no guard, bit for bit."""

import asyncio
import dataclasses
import time

import pytest
import torch

from passk_guard.mitigation.protected_direction import Pass1Loss
from passk_guard.sketch import ScoreSketcher
from tests.faults.harness import KINDS, PROJECT, Texts, add_guard, assert_same, make, train
from tests.helpers.tiny import digit_reward


def raises(completions, **_):
    torch.rand(3)
    raise ValueError("no verdict today")


def exits(completions, **_):
    raise SystemExit("the model wrote exit()")


def hangs(completions, **_):
    torch.rand(3)
    time.sleep(60)


def hangs_busily(completions, **_):
    while True:
        torch.rand(3)


async def hangs_later(completions, **_):
    await asyncio.sleep(60)


def texts(completions, **_):
    torch.rand(3)
    return ["correct"] * len(completions)


def nothing(completions, **_):
    return None


def not_numbers(completions, **_):
    return [float("nan")] * len(completions)


VERIFIERS = {
    raises: "`raises` raised on each of 96 samples, first ValueError: no verdict today",
    exits: "SystemExit: the model wrote exit()",
    hangs: "`hangs` was still running after 0.2 s",
    hangs_busily: "`hangs_busily` was still running after 0.2 s",
    hangs_later: "`hangs_later` was still running after 0.2 s",
    texts: "a reward 'correct' of type str",
    nothing: "returned NoneType None",
    not_numbers: "no prompt has 4 samples with a verdict",
}


def changed(**fields):
    return lambda samples: dataclasses.replace(samples, **{k: change(samples) for k, change in fields.items()})


def no_sampler(samples):
    raise ConnectionError("the server for generation is gone")


SAMPLERS = {
    "no completions": (changed(completion_ids=lambda s: [], completions=lambda s: []), "96 prompts, 0 completions"),
    "one short": (changed(completions=lambda s: s.completions[:-1]), "95 completions"),
    "no tokens": (changed(completion_ids=lambda s: [[] for _ in s.completion_ids]), "no token in any of 96"),
    "overlong": (changed(completion_ids=lambda s: [[7] * 100] * len(s)), "positions for 64"),
    "token id above": (changed(completion_ids=lambda s: [[7, 76]] * len(s)), "token id 76; the model has ids from 0"),
    "token id below": (changed(completion_ids=lambda s: [[-1, 7]] * len(s)), "token id -1"),
    "no samples": (lambda samples: None, "AttributeError"),
    "raises": (no_sampler, "ConnectionError: the server for generation is gone"),
}


def expect_failed_refresh(run, words, refreshes=2):
    assert [e["event"] for e in run.events if e["event"] in ("refresh", "failed_refresh")] == [
        "failed_refresh"
    ] * refreshes, run.events
    assert words in run.of("failed_refresh")[0]["reason"]
    assert run.guard.memory.voids == refreshes


@pytest.mark.parametrize(
    ("verifier", "mitigation"), [*((f, "project") for f in VERIFIERS), (raises, "off"), (hangs, "off")]
)
def test_verifiers(verifier, mitigation, references, tmp_path):
    trainer = make("lm", tmp_path)
    more = PROJECT if mitigation == "project" else {}
    sampler = Texts(trainer.processing_class)
    run = train(trainer, add_guard(trainer, correct=verifier, sampler=sampler, verifier_timeout=0.2, **more))
    expect_failed_refresh(run, VERIFIERS[verifier])
    assert_same(run, references.of("lm"))


@pytest.mark.slow
@pytest.mark.parametrize("verifier", [raises, hangs], ids=lambda f: f.__name__)
def test_verifiers_beside_grpo(verifier, references, tmp_path):
    trainer = make("grpo", tmp_path)
    run = train(trainer, add_guard(trainer, correct=verifier, verifier_timeout=0.2))
    expect_failed_refresh(run, VERIFIERS[verifier])
    assert_same(run, references.of("grpo"))


def test_a_hang_on_the_training_batch(references, tmp_path):
    trainer = make("grpo", tmp_path)
    guard = add_guard(trainer, correct=hangs, source="training_batch", num_samples=4, verifier_timeout=0.2)
    run = train(trainer, guard)
    assert "`hangs` was still running" in run.of("failed_refresh")[0]["reason"]
    assert_same(run, references.of("grpo"))


@pytest.mark.parametrize("fault", SAMPLERS)
def test_generation(fault, references, tmp_path):
    change, words = SAMPLERS[fault]
    trainer = make("lm", tmp_path)
    run = train(trainer, add_guard(trainer, sampler=Texts(trainer.processing_class, change=change), **PROJECT))
    expect_failed_refresh(run, words)
    assert_same(run, references.of("lm"))


def nan_weights(trainer):
    with torch.no_grad():
        trainer.model.lm_head.weight[3] = float("nan")


def infinite_weights(trainer):
    with torch.no_grad():
        trainer.model.lm_head.weight[3] = float("inf")


@pytest.mark.parametrize("damage", [nan_weights, infinite_weights])
def test_logits_that_are_not_finite(damage, references, tmp_path):
    trainer = make("lm", tmp_path)
    damage(trainer)
    run = train(trainer, add_guard(trainer, **PROJECT))
    expect_failed_refresh(run, "the model's logits are not finite")
    assert_same(run, references.of("lm", damage))


def test_logits_that_are_not_finite_in_the_sketch(references, tmp_path):
    trainer = make("lm", tmp_path)
    nan_weights(trainer)
    run = train(trainer, add_guard(trainer, sampler=Texts(trainer.processing_class), **PROJECT))
    expect_failed_refresh(run, "The sketched score vectors hold NaN or infinity")
    assert_same(run, references.of("lm", nan_weights))


def test_scores_whose_sum_over_batches_overflows(references, tmp_path, monkeypatch):
    sketch = ScoreSketcher.sketch
    monkeypatch.setattr(
        ScoreSketcher, "sketch", lambda self, *args, **kwargs: torch.full_like(sketch(self, *args, **kwargs), 3e38)
    )
    trainer = make("lm", tmp_path)
    sampler = Texts(trainer.processing_class)
    run = train(trainer, add_guard(trainer, sampler=sampler, max_probe_tokens=50, **PROJECT))
    expect_failed_refresh(run, "the inner products of the score vectors are not finite")
    assert_same(run, references.of("lm"))


def infinite_gradients(trainer):
    backward = trainer.accelerator.backward

    def overflowing(*args, **kwargs):
        backward(*args, **kwargs)
        trainer.model.lm_head.weight.grad[0, 0] = float("inf")

    trainer.accelerator.backward = overflowing


def test_training_gradients_that_are_not_finite_are_left_to_the_optimizer(references, tmp_path, caplog):
    trainer = make("lm", tmp_path)
    infinite_gradients(trainer)
    run = train(trainer, add_guard(trainer, sampler=Texts(trainer.processing_class), refresh_steps=10, **PROJECT))
    assert [e["event"] for e in run.events if e["event"] in ("refresh", "failed_refresh")] == ["refresh"]
    assert "steps are left to the optimizer as they are" in caplog.text
    assert_same(run, references.of("lm", infinite_gradients))


# Parts of our own that fail in ways nobody foresaw


@pytest.mark.parametrize("where", ["sketch", "estimate", "harvest"])
def test_an_error_in_any_stage(where, references, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        torch.rand(3)
        raise ArithmeticError("not foreseen")

    if where == "sketch":
        monkeypatch.setattr(ScoreSketcher, "sketch", broken)
    elif where == "estimate":
        monkeypatch.setattr("passk_guard.callback.guard.estimate_pooled", broken)
    else:
        monkeypatch.setattr(Pass1Loss, "__call__", broken)
    trainer = make("lm", tmp_path)
    run = train(trainer, add_guard(trainer, sampler=Texts(trainer.processing_class), **PROJECT))
    expect_failed_refresh(run, "ArithmeticError: not foreseen")
    assert_same(run, references.of("lm"))


def test_an_error_in_solving_for_the_floor(tmp_path, monkeypatch):
    from passk_guard import PassKObjective

    def broken(*args, **kwargs):
        raise ArithmeticError("not foreseen")

    monkeypatch.setattr("passk_guard.mitigation.floor_guard.solve_floor", broken)
    runs = []
    for guarded in (False, True):
        trainer = make("grpo", tmp_path / str(guarded), scale_rewards="none", loss_type="dr_grpo")
        with PassKObjective(trainer, k=4):
            runs.append(train(trainer, add_guard(trainer, mitigation="reweight") if guarded else None))
    expect_failed_refresh(runs[1], "ArithmeticError: not foreseen")
    assert_same(runs[1], runs[0])


def test_the_restoring_of_state_that_fails(references, tmp_path, monkeypatch):
    """Whatever leaves the refresh is void, also what comes from around its stages."""

    def broken(memory, *args, **kwargs):
        raise ZeroDivisionError("after the stages")

    monkeypatch.setattr("passk_guard.callback.state.Memory.with_refresh", broken)
    trainer = make("lm", tmp_path)
    run = train(trainer, add_guard(trainer, sampler=Texts(trainer.processing_class), **PROJECT))
    expect_failed_refresh(run, "ZeroDivisionError: after the stages")
    assert_same(run, references.of("lm"))


def test_a_probe_smaller_than_a_refresh(references, tmp_path):
    rows = [{"prompt": f"{i}!"} for i in range(3)]
    trainer = make("lm", tmp_path)
    run = train(trainer, add_guard(trainer, probe=rows, sampler=Texts(trainer.processing_class), probe_prompts=64))
    assert len(run.of("refresh")) == 2
    assert {e["prompts"] for e in run.of("refresh")} == {3, 6}
    assert_same(run, references.of("lm"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_refresh_that_is_void_in_the_middle_leaves_later_ones_whole(kind, references, tmp_path):
    calls = []

    def sometimes(completions, **_):
        calls.append(1)
        if len(calls) == 2:
            time.sleep(60)
        return digit_reward(completions)

    trainer = make(kind, tmp_path)
    run = train(trainer, add_guard(trainer, correct=sometimes, refresh_steps=1, verifier_timeout=0.5))
    assert [e["event"] for e in run.events if e["event"] in ("refresh", "failed_refresh")] == [
        "refresh",
        "failed_refresh",
        "refresh",
        "refresh",
    ]
    assert_same(run, references.of(kind))
