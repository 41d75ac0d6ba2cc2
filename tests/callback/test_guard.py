"""The callback in real trainers: it reports, and it changes nothing."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from passk_guard import GuardConfig, PassKGuardCallback, PassKObjective
from passk_guard.callback.state import load_memory
from passk_guard.utils.errors import GuardError
from tests.helpers.tiny import (
    digit_reward,
    probe_rows,
    tiny_chat_rows,
    tiny_grpo_trainer,
    tiny_lm_trainer,
    tiny_model,
    tiny_rloo_trainer,
    tiny_rows,
)

CONFIG = {"k": 4, "num_samples": 8, "probe_prompts": 12, "refresh_steps": 2, "patience": 1, "sketch_dim": 1024}
CONFIG |= {"probe_max_new_tokens": 4}
TRAINERS = {"lm": tiny_lm_trainer, "grpo": tiny_grpo_trainer, "rloo": tiny_rloo_trainer}


def guard_of(trainer, *, correct=digit_reward, probe=None, sampler=None, **config):
    probe = probe_rows() if probe is None else probe
    guard = PassKGuardCallback(trainer, probe, correct, GuardConfig(**(CONFIG | config)), sampler)
    trainer.add_callback(guard)
    return guard


def journal(folder):
    """Everything but the settings at the start of a run."""
    events = [json.loads(line) for line in (Path(folder) / "passk_guard.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] != "start"]


class Witness(TrainerCallback):
    """Everything of a run that a probe might disturb, step by step."""

    def __init__(self):
        self.trainer, self.seen = None, []

    def _note(self, where):
        model = self.trainer.model
        self.seen.append(
            (
                where,
                torch.get_rng_state().tolist()[:64],
                {n: m.training for n, m in model.named_modules()},
                {n: p.requires_grad for n, p in model.named_parameters()},
                {n: None if p.grad is None else p.grad.double().sum().item() for n, p in model.named_parameters()},
                self.trainer.processing_class.padding_side,
                model.generation_config.to_dict() if where == "end" else None,
                model.config.use_cache,
            )
        )

    def on_step_begin(self, args, state, control, **kwargs):
        self._note("begin")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._note("before the optimizer")

    def on_step_end(self, args, state, control, **kwargs):
        self._note("end")


def run(make, folder, guarded, dropout=0.2, **config):
    trainer = make(folder, model=tiny_model(attention_dropout=dropout), max_steps=5, gradient_accumulation_steps=2)
    if guarded:
        guard_of(trainer, **config)
    witness = Witness()
    witness.trainer = trainer
    trainer.add_callback(witness)
    trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    rows = [{k: v for k, v in row.items() if k in ("loss", "grad_norm", "reward")} for row in trainer.state.log_history]
    return weights, rows, witness.seen, trainer


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_is_bit_for_bit_the_same(kind, tmp_path):
    weights, rows, seen, _ = run(TRAINERS[kind], tmp_path / "without", False)
    guarded_weights, guarded_rows, guarded_seen, trainer = run(TRAINERS[kind], tmp_path / "with", True, refresh_steps=1)
    assert len([e for e in journal(tmp_path / "with") if e["event"] == "refresh"]) == 5
    assert rows == guarded_rows
    assert seen == guarded_seen
    assert all(torch.equal(weights[name], guarded_weights[name]) for name in weights)
    assert "log" not in vars(trainer), "the patch is gone"


def test_training_is_bit_for_bit_the_same_with_the_training_batch_as_probe(tmp_path):
    weights, rows, seen, _ = run(tiny_grpo_trainer, tmp_path / "without", False)
    settings = {"source": "training_batch", "num_samples": 4, "refresh_steps": 1, "correct": "digit_reward"}
    guarded_weights, guarded_rows, guarded_seen, _ = run(tiny_grpo_trainer, tmp_path / "with", True, **settings)
    assert rows == guarded_rows
    assert seen == guarded_seen
    assert all(torch.equal(weights[name], guarded_weights[name]) for name in weights)
    events = journal(tmp_path / "with")
    assert {e["held_out"] for e in events if e["event"] == "refresh"} == {False}


def test_training_is_bit_for_bit_the_same_when_the_probe_fails(tmp_path):
    def broken(**_):
        torch.rand(3)
        raise ValueError("no verdict today")

    weights, rows, seen, _ = run(tiny_grpo_trainer, tmp_path / "without", False)
    guarded_weights, guarded_rows, guarded_seen, _ = run(tiny_grpo_trainer, tmp_path / "with", True, correct=broken)
    assert rows == guarded_rows
    assert seen == guarded_seen
    assert all(torch.equal(weights[name], guarded_weights[name]) for name in weights)
    events = journal(tmp_path / "with")
    assert [e["event"] for e in events] == ["failed_refresh"] * 3
    assert "ValueError: no verdict today" in events[0]["reason"]


@pytest.mark.parametrize("kind", TRAINERS)
def test_numbers_reach_the_row_of_the_loss_once(kind, tmp_path):
    trainer = TRAINERS[kind](tmp_path, max_steps=4)
    guard_of(trainer)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 4
    carrying = [row["step"] for row in rows if "passk_guard/probe_seconds" in row]
    assert carrying == [1, 3]
    for row in rows:
        assert all(math.isfinite(v) for key, v in row.items() if key.startswith("passk_guard/"))
    assert {"passk_guard/pass_at_1", "passk_guard/pass_at_4", "passk_guard/pass_at_1_se"} <= set(rows[0])


def test_numbers_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = tiny_grpo_trainer(tmp_path, report_to=["tensorboard"])
    guard_of(trainer)
    trainer.train()
    folder = next(path.parent for path in tmp_path.rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["train/passk_guard/pass_at_1"] == [1]
    assert scalars["train/loss"] == [1, 2]


class FixedSampler:
    """A stand-in for the policy's samples: easy prompts are nearly always right, hard ones nearly never."""

    temperature = 1.0

    def __init__(self, tokenizer, rate):
        self.tokenizer, self.rate = tokenizer, rate

    def check_lengths(self, rows):
        pass

    def sample(self, rows, num_samples, seed):
        from passk_guard.probe.samplers import Samples

        generator = torch.Generator().manual_seed(seed)
        prompts, completions = [], []
        for row in rows:
            prompts += [self.tokenizer(row["prompt"])["input_ids"]] * num_samples
            right = torch.rand(num_samples, generator=generator) < self.rate(row)
            completions += ["1" if r else "a" for r in right]
        return Samples(prompts, [self.tokenizer(c)["input_ids"] for c in completions], completions)


def conflicted(tmp_path, args=None, **config):
    """One prompt in seven wants a digit and the others a letter, for no reason the model could see."""

    def tag(completions, wanted, **_):
        return [float(c.isdigit() == (w == "digit")) for c, w in zip(completions, wanted, strict=True)]

    rows = [{"prompt": f"{i:02d}=", "wanted": "letter" if i % 7 else "digit"} for i in range(100)]
    model = tiny_model(initializer_range=0.05)
    trainer = tiny_lm_trainer(tmp_path, **({"model": model, "max_steps": 6, "learning_rate": 0.0} | (args or {})))
    sampler = FixedSampler(trainer.processing_class, lambda row: 0.1)
    config = {"k": 8, "num_samples": 16, "probe_prompts": 90, "refresh_steps": 1, "patience": 2} | config
    return trainer, guard_of(trainer, correct=tag, probe=rows, sampler=sampler, **config)


def test_a_conflict_is_one_warning_one_state_line_and_one_alert(tmp_path, caplog, monkeypatch):
    import sys
    import types

    calls = []
    trackio = types.SimpleNamespace(alert=lambda **kw: calls.append(kw), AlertLevel=types.SimpleNamespace(WARN="warn"))
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    trainer, guard = conflicted(tmp_path)
    trainer.args.report_to = ["trackio"]
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        trainer.train()
    lines = [r.getMessage() for r in caplog.records if ": CONFLICT " in r.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("passk_guard step 1: CONFLICT cos(pass@1, pass@8) = -")
    assert ", 95% CI [-" in lines[0]
    assert "2 refreshes pooled; k* = " in lines[0]
    assert lines[0].endswith("; action: observe")
    states = [e for e in journal(tmp_path) if e["event"] == "state"]
    assert [(e["from"], e["to"]) for e in states] == [("undetermined", "conflict")]
    assert states[0]["message"] == lines[0]
    (call,) = calls
    assert (call["title"], call["level"]) == ("passk_guard: CONFLICT", "warn")
    evidence, to_do, cost = call["text"].splitlines()
    assert evidence == lines[0]
    assert to_do.startswith("What to do: ")
    assert 'mitigation="project"' in to_do
    assert cost.startswith("WARN; ")
    assert "s in the probe (" in cost
    assert "arXiv 2602.21189" in cost
    statuses = [row["passk_guard/status"] for row in trainer.state.log_history if "passk_guard/status" in row]
    assert statuses == [0, 2, 2, 2, 2, 2]
    rows = [row for row in trainer.state.log_history if "passk_guard/conflict" in row]
    assert {row["passk_guard/conflict"] for row in rows} == {1.0}
    assert guard.estimate.status == "conflict"


@pytest.mark.parametrize(("size", "warned"), [(12, "after every refresh"), (35, "after 2.9 refreshes"), (36, None)])
def test_a_probe_set_whose_prompts_recur_is_warned_about(tmp_path, caplog, size, warned):
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        guard_of(tiny_lm_trainer(tmp_path), probe=probe_rows(size), probe_prompts=12, pool_refreshes=3)
    assert (warned is None and not caplog.text) or (warned in caplog.text and "Pass at least 36 prompts" in caplog.text)


@pytest.mark.parametrize(("size", "warned"), [(47, "after 2.9 refreshes"), (48, None)])
def test_recurrence_is_judged_by_the_size_that_the_budget_has_room_for(tmp_path, caplog, size, warned):
    """16 prompts a refresh in this short run, and not the 64 that a long one could ask."""
    settings = {"probe_prompts": None, "refresh_steps": None, "probe": probe_rows(size)}
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        guard_of(tiny_lm_trainer(tmp_path, max_steps=2), **settings)
        assert "the same ones recur" not in caplog.text
        run(tiny_lm_trainer, tmp_path, True, **settings)
    assert "16 of" in caplog.text
    assert caplog.text.count("the same ones recur") == (warned is not None)
    assert warned is None or (f"{warned}. " in caplog.text and "(3 x 16)" in caplog.text)


def test_failed_refreshes_alert_once_and_recover(tmp_path, caplog):
    calls = []

    def sometimes(completions, **_):
        calls.append(1)
        return ["yes"] * len(completions) if len(calls) <= 3 else [1.0] * len(completions)

    trainer = tiny_lm_trainer(tmp_path, max_steps=6)
    guard = guard_of(trainer, correct=sometimes, refresh_steps=1, failed_refresh_alert=2)
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        trainer.train()
    text = "\n".join(r.getMessage() for r in caplog.records)
    assert text.count(": refresh failed: ") == 3
    assert text.count("no valid refresh in the last 2") == 1
    kinds = [e["event"] for e in journal(tmp_path) if e["event"] in ("refresh", "failed_refresh")]
    assert kinds == ["failed_refresh"] * 3 + ["refresh"] * 3
    assert guard.memory.failures == 0
    assert "always solved" in guard.estimate.reason


def test_partly_missing_verdicts_lower_n(tmp_path):
    def half(completions, **_):
        return [None if i % 2 else float(i % 4 == 0) for i in range(len(completions))]

    trainer = tiny_lm_trainer(tmp_path, max_steps=1)
    guard = guard_of(trainer, correct=half)
    trainer.train()
    assert guard.memory.history[-1].num_samples.tolist() == [4] * 12
    assert guard.estimate.pass_at_1 == pytest.approx(0.5)
    trainer = tiny_lm_trainer(tmp_path / "too few", max_steps=1)
    guard_of(trainer, correct=half, k=5)
    trainer.train()
    assert "no prompt has 5 samples with a verdict" in journal(tmp_path / "too few")[0]["reason"]


@pytest.mark.parametrize(("rule", "stopped_at"), [("each_look", 2), ("whole_run", 1)])
def test_resuming_gives_the_verdicts_of_the_uninterrupted_run(tmp_path, rule, stopped_at):
    config = {"pool_refreshes": 2, "patience": 3, "advanced": {"alert_rule": rule}}
    whole, _ = conflicted(tmp_path / "whole", **config)
    whole.train()
    saving = {"max_steps": stopped_at, "save_strategy": "steps", "save_steps": stopped_at}
    first, _ = conflicted(tmp_path / "cut", saving, **config)
    first.train()
    checkpoint = tmp_path / "cut" / f"checkpoint-{stopped_at}"
    memory = load_memory(checkpoint)
    assert memory is not None
    assert memory.decision.streak == (1 if rule == "each_look" else 0)
    assert len(memory.evidence.checks) == stopped_at
    second, _ = conflicted(tmp_path / "cut", **config)
    second.train(resume_from_checkpoint=str(checkpoint))

    def numbers(folder):
        return [
            {k: v for k, v in e.items() if k not in ("time", "probe_seconds", "step_seconds")} for e in journal(folder)
        ]

    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert [e["event"] for e in journal(tmp_path / "whole")].count("state") == 1


def test_a_checkpoint_older_than_the_guard_resumes(tmp_path, caplog):
    trainer = tiny_lm_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer = tiny_lm_trainer(tmp_path, max_steps=4)
    guard_of(trainer)
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert "resumed without the guard's memory" in caplog.text


def test_the_guard_beside_the_pass_at_k_objective(tmp_path):
    trainer = tiny_grpo_trainer(tmp_path, scale_rewards="none", loss_type="dr_grpo")
    guard = guard_of(trainer, source="training_batch", num_samples=4, refresh_steps=1)
    with PassKObjective(trainer, k=4):
        trainer.train()
    assert guard.memory.history[-1].num_samples.tolist() == [4, 4]
    assert not {"log", "_calculate_rewards", "_generate_and_score_completions"} & set(vars(trainer))


def test_conversational_prompts_in_bf16_that_may_overlap_with_training(tmp_path):
    train = Dataset.from_list(tiny_chat_rows(16))
    trainer = tiny_grpo_trainer(tmp_path, train_dataset=train, bf16=True)
    guard = guard_of(trainer, probe=tiny_chat_rows(20), allow_overlap=True)
    trainer.train()
    assert guard.estimate is not None
    assert journal(tmp_path)[0]["event"] == "refresh", journal(tmp_path)[0]


def needs_answer(completions, answer):
    return [1.0] * len(completions)


def frozen(trainer):
    trainer.model.requires_grad_(False)
    return trainer


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t: guard_of(t, probe=[]), "found 0 in 0 rows"),
        (lambda t: guard_of(t, probe=probe_rows(1)), "found 1 in 1 rows"),
        (lambda t: PassKGuardCallback(t, probe_rows()), "`correct`"),
        (lambda t: PassKGuardCallback(t, None, digit_reward), "`probe`"),
        (lambda t: guard_of(t, correct="accuracy"), "'digit_reward'"),
        (lambda t: guard_of(t, probe=tiny_rows(4)), "in the training set"),
        (lambda t: guard_of(t, probe=[{"prompt": "1" * 70}, {"prompt": "2"}, {"prompt": "3"}]), "context"),
        (lambda t: guard_of(t, source="training_batch", k=8), "num_generations=4, k=8"),
        (lambda t: guard_of(t, probe="nowhere.jsonl"), "nowhere.jsonl"),
        (lambda t: guard_of(t, k=16), "raise `num_samples` or lower `k`"),
        (lambda t: guard_of(t, correct=needs_answer, probe=[{"prompt": p} for p in "abc"]), "`answer`"),
        (lambda t: guard_of(frozen(t)), "trainable"),
    ],
)
def test_misuse_is_an_error_at_construction(call, words, tmp_path):
    with pytest.raises(ValueError, match="(?i)" + words):
        call(tiny_grpo_trainer(tmp_path))


def test_the_newest_refreshes_are_pooled(tmp_path):
    trainer, guard = conflicted(tmp_path, pool_refreshes=2)
    trainer.train()
    assert len(guard.memory.history) == 2
    assert guard.estimate.num_refreshes == 2
    assert [e["refreshes"] for e in journal(tmp_path) if e["event"] == "refresh"] == [1, 2, 2, 2, 2, 2]


def test_the_training_batch_where_not_every_step_generates(tmp_path):
    trainer = tiny_grpo_trainer(tmp_path, max_steps=9, num_iterations=2)
    guard_of(trainer, source="training_batch", num_samples=4, refresh_steps=3)
    trainer.train()
    assert [e["step"] for e in journal(tmp_path)] == [0, 4, 8]


def test_lora_is_watched_through_its_adapters_and_stays_bit_for_bit(tmp_path):
    from peft import LoraConfig

    def trained(folder, guarded):
        lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.1, init_lora_weights=False)
        torch.manual_seed(0)
        trainer = tiny_grpo_trainer(folder, peft_config=lora)
        guard = guard_of(trainer, refresh_steps=1) if guarded else None
        trainer.train()
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}, guard

    without, _ = trained(tmp_path / "without", False)
    found, guard = trained(tmp_path / "with", True)
    assert without
    assert all(torch.equal(without[name], found[name]) for name in without)
    assert guard._sketcher.coverage.share == 1.0
    assert guard._sketcher.coverage.total == sum(p.numel() for p in found.values())
    assert float(guard.memory.history[-1].gram.abs().max()) > 0


@pytest.mark.parametrize("wanted", [True, None])
def test_the_progress_bar_shows_where_it_is_wanted(wanted, tmp_path, capfd):
    trainer = tiny_lm_trainer(tmp_path, max_steps=1)
    guard_of(trainer, progress_bar=wanted)
    trainer.train()
    assert ("passk_guard probe" in capfd.readouterr().err) is bool(wanted), "quiet when nobody watches a terminal"


def test_a_resumed_run_keeps_to_the_size_of_a_pass_that_the_free_memory_had_room_for(tmp_path, monkeypatch, caplog):
    saving = {"save_strategy": "steps", "save_steps": 1}
    monkeypatch.setattr("passk_guard.callback.guard.choose_tokens", lambda *_, **__: 1024)
    caplog.set_level(logging.INFO, "passk_guard")
    trainer = tiny_lm_trainer(tmp_path, max_steps=1, **saving)
    guard_of(trainer)
    trainer.train()
    assert "passes of at most 1,024 tokens, about 0.002" in caplog.text
    monkeypatch.setattr("passk_guard.callback.guard.choose_tokens", lambda *_, **__: 2048)
    for given, used in ((None, 1024), (600, 600)):
        trainer = tiny_lm_trainer(tmp_path, max_steps=1, **saving)
        guard = guard_of(trainer, max_probe_tokens=given)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert guard.memory.pass_tokens == used


def mostly_bare_model():
    """A tiny model most of whose parameters are one of the model itself, which no sketch sees."""
    model = tiny_model()
    model.gain = torch.nn.Parameter(torch.ones(200, 200))
    model.model.norm.register_forward_hook(lambda module, args, output: output * model.gain.mean())
    return model


@pytest.mark.filterwarnings("ignore:The sketch covers", "ignore:These trainable parameters")
def test_a_sketch_of_too_little_leaves_the_change_alone(tmp_path, caplog):
    trainer = tiny_lm_trainer(tmp_path, model=mostly_bare_model(), max_steps=3)
    guard_of(trainer)
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        trainer.train()
    assert [r for r in caplog.messages if "the angle is not measured" in r and "gain (40,000)" in r]
    assert {event["event"] for event in journal(tmp_path)} == {"change"}


@pytest.mark.filterwarnings("ignore:The sketch covers", "ignore:These trainable parameters")
@pytest.mark.parametrize("needs", [{"instruments": "angle"}, {"mitigation": "project"}])
def test_a_sketch_of_too_little_is_refused_where_it_is_needed(needs, tmp_path):
    trainer = tiny_lm_trainer(tmp_path, model=mostly_bare_model(), max_steps=3)
    guard_of(trainer, **needs)
    with pytest.raises(GuardError, match=r"at least 80% .*; found \d+\.\d%\. Not covered: gain \(40,000\)"):
        trainer.train()
