"""mitigation="project" in real trainers: what the optimizer sees, when it acts, and what it leaves alone."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from passk_guard import GuardConfig, ScoreSketcher
from passk_guard.callback.mitigator import MEASURED_OF
from passk_guard.mitigation.protected_direction import Pass1Loss, direction_noise, pass1_loss
from passk_guard.passk.closed_forms import sample_coefficients
from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.probe.refresh import Refresher
from passk_guard.utils.ranks import Ranks
from tests.callback.test_guard import conflicted, guard_of, journal
from tests.helpers.tiny import probe_rows, tiny_grpo_trainer, tiny_lm_trainer, tiny_model

PROJECT = {"mitigation": "project", "gate": "always", "refresh_steps": 2}
TRAINERS = {"lm": tiny_lm_trainer, "grpo": tiny_grpo_trainer}


def parameters(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Gradients(TrainerCallback):
    """The gradient as the optimizer finds it, and the direction that was protected then."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        gradient = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        protected = torch.cat([p.double().flatten() for p in self.guard._mitigator.steps.protected])
        self.seen.append(float(gradient @ protected / gradient.norm() / protected.norm()))


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_the_optimizer_sees_a_gradient_within_the_constraint(kind, gamma, tmp_path):
    trainer = TRAINERS[kind](tmp_path, max_steps=5, gradient_accumulation_steps=2, max_grad_norm=0.05)
    watcher = Gradients()
    watcher.guard = guard_of(trainer, gamma=gamma, **PROJECT)
    trainer.add_callback(watcher)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "passk_guard/train_cosine" in row]
    assert len(rows) == len(watcher.seen) == 5
    changed = [row["passk_guard/mitigated"] for row in rows]
    assert any(changed), "the fixture must put the projection to work"
    for row, after in zip(rows, watcher.seen, strict=True):
        before = row["passk_guard/train_cosine"]
        expected = before if before >= gamma else gamma / math.sqrt(1 + gamma**2 - before**2)
        assert after == pytest.approx(expected, abs=1e-4)
        assert row["passk_guard/mitigated"] == float(before < gamma)
    probe = watcher.guard.memory.history[-1]
    everything = SimpleNamespace(probe=probe, num_samples=probe.num_samples, fewest=1)
    steering = torch.arange(probe.num_samples.numel()) % MEASURED_OF != MEASURED_OF - 1
    [*_, newest] = [event for event in journal(tmp_path) if event["event"] == "refresh"]
    assert newest["protected_reliability"] == pytest.approx(1 - direction_noise(everything, steering).squared)


def test_a_closed_gate_is_bit_for_bit_no_guard(tmp_path):
    plain = tiny_grpo_trainer(tmp_path / "without", model=tiny_model(attention_dropout=0.2), max_steps=4)
    plain.train()
    guarded = tiny_grpo_trainer(tmp_path / "with", model=tiny_model(attention_dropout=0.2), max_steps=4)
    guard_of(guarded, mitigation="project", gate="conflict", refresh_steps=1, advanced={"gate_confidence": 0.999999})
    guarded.train()
    assert same(parameters(plain), parameters(guarded))
    assert not any("passk_guard/train_cosine" in row for row in guarded.state.log_history)


def test_an_open_gate_without_conflict_changes_nothing_either(tmp_path):
    """The direction is harvested and the cosine measured, yet a step within the constraint stays unchanged."""

    plain = tiny_lm_trainer(tmp_path / "without", model=tiny_model(attention_dropout=0.2))
    plain.train()
    guarded = tiny_lm_trainer(tmp_path / "with", model=tiny_model(attention_dropout=0.2))
    guard = guard_of(guarded, **PROJECT)

    class Agree(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            guard._mitigator.steps.engine.inner_products = lambda pairs: [1.0] * len(pairs)

    guarded.add_callback(Agree)
    guarded.train()
    assert same(parameters(plain), parameters(guarded))
    rows = [row for row in guarded.state.log_history if "passk_guard/train_cosine" in row]
    assert {row["passk_guard/mitigated"] for row in rows} == {0.0}


def test_the_gate_opens_on_conflict_and_says_so(tmp_path, caplog):
    trainer, _ = conflicted(tmp_path, mitigation="project")
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        trainer.train()
    assert "CONFLICT" in caplog.text
    assert "; action: project (gamma 0.2)" in caplog.text
    rows = [row for row in trainer.state.log_history if "passk_guard/train_cosine" in row]
    assert rows
    events = [e for e in journal(tmp_path) if e["event"] == "steps"]
    assert [e["train_cosine"] for e in events] == [row["passk_guard/train_cosine"] for row in rows]


def scored_batch(trainer, m=5, n=4):
    """Rollouts of m prompts with n completions each, half of them right."""
    tokenizer = trainer.processing_class
    rows = probe_rows(m)
    texts = [f"{(i * 7) % 10}a"[: 1 + i % 2] for i in range(m * n)]
    correct = torch.tensor([(i // n + i) % 3 == 0 for i in range(m * n)], dtype=torch.int8)
    return (
        Rollouts(
            rows=[rows[i // n] for i in range(m * n)],
            prompt_index=[i // n for i in range(m * n)],
            prompt_ids=[tokenizer(rows[i // n]["prompt"])["input_ids"] for i in range(m * n)],
            completion_ids=[tokenizer(text)["input_ids"] for text in texts],
            completions=texts,
            num_prompts=m,
            temperature=0.8,
        ),
        Outcomes(correct),
    )


def test_the_protected_direction_is_the_pass_at_1_gradient_of_the_probe(tmp_path):
    """Against the exact score vectors of the sketcher: -(1/m) sum of alpha+ S+ + alpha- S-."""
    trainer = tiny_lm_trainer(tmp_path, model=tiny_model(initializer_range=0.1))
    rollouts, outcomes = scored_batch(trainer)
    sketcher = ScoreSketcher(trainer.model, method="identity")
    done = Refresher(sketcher, Ranks(torch.device("cpu")), 2, 64, 0).run(lambda: (rollouts, outcomes), (), 0)
    loss = pass1_loss(done, num_ranks=1)
    assert isinstance(loss, Pass1Loss)
    trainer.model.eval()
    total = sum(loss(trainer.model, batch) for batch in done.batches)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(trainer.model.parameters()))])
    sums = torch.zeros(10, sketcher.dim)
    for batch in done.batches:
        sums += sketcher.sketch(
            batch.input_ids, batch.attention_mask, batch.completion_mask, batch.slots, 10, temperature=0.8
        )
    positive, negative = sample_coefficients(done.num_samples, done.num_correct, 1)
    expected = -(torch.cat([positive, negative]).float() @ sums) / 5
    assert expected.norm() > 0
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5


def test_resuming_gives_the_parameters_of_the_uninterrupted_run(tmp_path):
    def make(folder, **args):
        settings = {"max_steps": 6, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 3}
        trainer = tiny_lm_trainer(tmp_path / folder, **(settings | args))
        guard = guard_of(trainer, **(PROJECT | {"gamma": 0.9, "advanced": {"protected_average": 0.5}}))
        return trainer, guard

    whole, _ = make("whole")
    whole.train()
    first, _ = make("cut", max_steps=3)
    first.train()
    second, _ = make("cut")
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert same(parameters(whole), parameters(second))
    mitigated = [row["passk_guard/mitigated"] for row in whole.state.log_history if "passk_guard/mitigated" in row]
    assert sum(mitigated) > 3
    assert "passk_guard/mitigated" in next(row for row in second.state.log_history if row.get("step") == 4)


def test_nothing_is_left_on_the_trainer(tmp_path):
    trainer = tiny_lm_trainer(tmp_path)
    guard_of(trainer, **PROJECT)
    before = dict(vars(trainer.accelerator))
    trainer.train()
    assert "log" not in vars(trainer)
    assert "backward" not in vars(trainer.accelerator)
    assert set(vars(trainer.accelerator)) == set(before)


@pytest.mark.parametrize("solved", [0.0, 1.0])
def test_a_probe_without_a_gradient_leaves_steps_alone(solved, tmp_path):
    plain = tiny_lm_trainer(tmp_path / "without", max_steps=3)
    plain.train()
    guarded = tiny_lm_trainer(tmp_path / "with", max_steps=3)
    guard_of(guarded, correct=lambda completions, **_: [solved] * len(completions), **PROJECT)
    guarded.train()
    assert same(parameters(plain), parameters(guarded))
    kinds = {e["event"] for e in journal(tmp_path / "with")}
    assert kinds == {"refresh", "change"}, "no refresh failed, and no verdict changed"


def test_observing_chooses_no_engine(tmp_path, monkeypatch):
    monkeypatch.setattr("passk_guard.callback.mitigator.choose_engine", lambda _: pytest.fail("not asked for"))
    trainer = tiny_lm_trainer(tmp_path, max_steps=1)
    guard_of(trainer)
    trainer.train()
    assert journal(tmp_path)[0]["event"] == "refresh"


def test_the_training_batch_cannot_be_projected_on():
    with pytest.raises(ValueError, match="held_out"):
        GuardConfig(mitigation="project", source="training_batch")
