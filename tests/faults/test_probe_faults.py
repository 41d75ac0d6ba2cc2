"""Faults of the probe: the refresh fails with a reason, and training is bit for bit that without a guard."""

import time

import pytest
import torch

from passk_guard import PassKObjective
from passk_guard.sketch import ScoreSketcher
from tests.faults.harness import (
    KINDS,
    PROJECT,
    SAMPLERS,
    VERIFIERS,
    Texts,
    add_guard,
    assert_same,
    hangs,
    make,
    raises,
    train,
)
from tests.helpers.tiny import digit_reward


def expect_failure(run, words, refreshes=2):
    assert run.failed == [True] * refreshes, run.events
    assert words in run.of("failed_refresh")[0]["reason"]
    assert run.guard.memory.failures == refreshes


def guarded(tmp_path, *, change=None, prepare=lambda trainer: None, **config):
    """A run with projection on fixed completions."""
    trainer = make("lm", tmp_path)
    prepare(trainer)
    sampler = Texts(trainer.processing_class, change=change)
    return train(trainer, add_guard(trainer, **(PROJECT | {"sampler": sampler} | config)))


@pytest.mark.parametrize(
    ("verifier", "mitigation"), [*((f, "project") for f in VERIFIERS), (raises, "off"), (hangs, "off")]
)
def test_verifiers(verifier, mitigation, references, tmp_path):
    run = guarded(tmp_path, correct=verifier, verifier_timeout=0.2, mitigation=mitigation)
    expect_failure(run, VERIFIERS[verifier])
    assert_same(run, references.of("lm"))


def test_a_hang_on_the_training_batch(references, tmp_path):
    trainer = make("grpo", tmp_path)
    guard = add_guard(trainer, correct=hangs, source="training_batch", num_samples=4, verifier_timeout=0.2)
    run = train(trainer, guard)
    assert "`hangs` was still running" in run.of("failed_refresh")[0]["reason"]
    assert_same(run, references.of("grpo"))


@pytest.mark.parametrize("fault", SAMPLERS)
def test_generation(fault, references, tmp_path):
    change, words = SAMPLERS[fault]
    expect_failure(run := guarded(tmp_path, change=change), words)
    assert_same(run, references.of("lm"))


def nan_weights(trainer):
    with torch.no_grad():
        trainer.model.lm_head.weight[3] = float("nan")


def infinite_weights(trainer):
    with torch.no_grad():
        trainer.model.lm_head.weight[3] = float("inf")


@pytest.mark.parametrize("damage", [nan_weights, infinite_weights])
def test_logits_that_are_not_finite(damage, references, tmp_path):
    run = guarded(tmp_path, prepare=damage, sampler=None)
    expect_failure(run, "the model's logits are not finite")
    assert_same(run, references.of("lm", damage))


def test_logits_that_are_not_finite_in_the_sketch(references, tmp_path):
    run = guarded(tmp_path, prepare=nan_weights)
    expect_failure(run, "The sketched score vectors hold NaN or infinity")
    assert_same(run, references.of("lm", nan_weights))


def test_scores_whose_sum_over_batches_overflows(references, tmp_path, monkeypatch):
    sketch = ScoreSketcher.sketch
    monkeypatch.setattr(
        ScoreSketcher, "sketch", lambda self, *args, **kwargs: torch.full_like(sketch(self, *args, **kwargs), 3e38)
    )
    run = guarded(tmp_path, max_probe_tokens=1)  # a pass for each sample
    expect_failure(run, "the inner products of the score vectors are not finite")
    assert_same(run, references.of("lm"))


def infinite_gradients(trainer):
    backward = trainer.accelerator.backward

    def overflowing(*args, **kwargs):
        backward(*args, **kwargs)
        trainer.model.lm_head.weight.grad[0, 0] = float("inf")

    trainer.accelerator.backward = overflowing


def test_training_gradients_that_are_not_finite_stay_unchanged(references, tmp_path, caplog):
    run = guarded(tmp_path, prepare=infinite_gradients, refresh_steps=10)
    assert run.failed == [False]
    assert "steps stay unchanged where" in caplog.text
    assert_same(run, references.of("lm", infinite_gradients))


@pytest.mark.parametrize(
    "part",
    [
        "sketch.ScoreSketcher.sketch",
        "callback.guard.estimate_pooled",
        "mitigation.protected_direction.Pass1Loss.__call__",
        "callback.state.Memory.with_refresh",
    ],
)
def test_an_error_that_nobody_foresaw(part, references, tmp_path, monkeypatch):
    """In each stage of a refresh, and around the stages."""

    def broken(*args, **kwargs):
        torch.rand(3)
        raise ArithmeticError("not foreseen")

    monkeypatch.setattr(f"passk_guard.{part}", broken)
    expect_failure(run := guarded(tmp_path), "ArithmeticError: not foreseen")
    assert_same(run, references.of("lm"))


def test_an_error_in_solving_for_the_floor(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ArithmeticError("not foreseen")

    monkeypatch.setattr("passk_guard.mitigation.floor_guard.solve_floor", broken)
    runs = []
    for is_guarded in (False, True):
        trainer = make("grpo", tmp_path / str(is_guarded), scale_rewards="none", loss_type="dr_grpo")
        with PassKObjective(trainer, k=4):
            runs.append(train(trainer, add_guard(trainer, mitigation="reweight") if is_guarded else None))
    expect_failure(runs[1], "ArithmeticError: not foreseen")
    assert_same(runs[1], runs[0])


def test_a_probe_smaller_than_a_refresh(references, tmp_path):
    run = guarded(tmp_path, probe=[{"prompt": f"{i}!"} for i in range(3)], probe_prompts=64, mitigation="off")
    assert [e["prompts"] for e in run.of("refresh")] == [3, 6]
    assert_same(run, references.of("lm"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_refresh_in_the_middle_leaves_later_ones_whole(kind, references, tmp_path):
    calls = []

    def sometimes(completions, **_):
        calls.append(1)
        if len(calls) == 2:
            time.sleep(60)
        return digit_reward(completions)

    trainer = make(kind, tmp_path)
    run = train(trainer, add_guard(trainer, correct=sometimes, refresh_steps=1, verifier_timeout=0.5))
    assert run.failed == [False, True, False, False]
    assert_same(run, references.of(kind))
