"""The realised change in real trainers: windows between refreshes, what ends them, and a run that is not disturbed."""

import dataclasses
import logging
from contextlib import nullcontext

import pytest
import torch

from passk_guard import GuardConfig, GuardError, PassKObjective
from passk_guard.callback import guard as guard_module
from passk_guard.callback import realised as realised_module
from passk_guard.callback.mitigator import Mitigator, NoMitigation
from passk_guard.change import estimate_change
from passk_guard.probe import rescoring as rescoring_module
from passk_guard.probe.rescoring import Rescorer
from passk_guard.reporting import reporter as reporter_module
from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.ranks import Ranks
from tests.callback.test_guard import TRAINERS, guard_of, journal, run
from tests.helpers.tiny import digit_reward, probe_rows, tiny_grpo_trainer, tiny_lm_trainer, tiny_model


def windows(folder):
    return [event for event in journal(folder) if event["event"] == "change"]


def trained(make, folder, steps=7, guard=None, **args):
    trainer = make(folder, model=tiny_model(), max_steps=steps, **({"learning_rate": 2e-3} | args))
    guard = guard_of(trainer, **(guard or {}))
    trainer.train()
    return trainer, guard


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_window_closes_at_each_refresh_after_the_first(kind, tmp_path):
    trainer, guard = trained(TRAINERS[kind], tmp_path)
    found = windows(tmp_path)
    assert [(event["since"], event["step"]) for event in found] == [(0, 2), (2, 4), (4, 6)]
    assert all(event["prompts"] == 12 and event["remark"] is None for event in found)
    assert all(event["pass_at_1_change"] != 0 and event["pass_at_1_change_se"] > 0 for event in found)
    total = sum(event["pass_at_1_change"] for event in found)
    assert found[-1]["pass_at_1_total"] == pytest.approx(total)
    assert guard.memory.change.sums.windows == 3
    rows = [row for row in trainer.state.log_history if "passk_guard/pass_at_1_change" in row]
    assert [row["passk_guard/pass_at_1_change"] for row in rows] == [event["pass_at_1_change"] for event in found]
    assert all(row["passk_guard/pass_at_1"] == event["pass_at_1"] for row, event in zip(rows, found, strict=True))
    assert {"passk_guard/pass_at_4_change", "passk_guard/pass_at_4_total_ci_low"} <= set(rows[0])


def test_nothing_that_was_trained_nothing_that_changed(tmp_path):
    trained(tiny_lm_trainer, tmp_path, learning_rate=0.0)
    for event in windows(tmp_path):
        assert event["pass_at_1_change"] == event["pass_at_4_change"] == 0.0
        assert event["effective_samples"] == 1.0


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_change_alone_leaves_training_bit_for_bit_the_same(kind, tmp_path, monkeypatch):
    weights, rows, seen, _ = run(TRAINERS[kind], tmp_path / "without", False)
    monkeypatch.setattr(guard_module, "ScoreSketcher", None)  # it takes no sketch
    settings = {"instruments": "change", "refresh_steps": 1}
    guarded_weights, guarded_rows, guarded_seen, _ = run(TRAINERS[kind], tmp_path / "with", True, **settings)
    assert rows == guarded_rows
    assert seen == guarded_seen
    assert all(torch.equal(weights[name], guarded_weights[name]) for name in weights)
    assert {event["event"] for event in journal(tmp_path / "with")} <= {"change", "outcome", "steps"}
    assert len(windows(tmp_path / "with")) == 4


def test_a_forward_that_fails_costs_the_window_and_nothing_else(tmp_path, monkeypatch):
    weights, rows, seen, _ = run(tiny_grpo_trainer, tmp_path / "without", False)
    scored, calls = Rescorer.log_ratios, []

    def broken(self, window):
        calls.append(window.step)
        if len(calls) == 1:
            raise FailedRefresh("the forward pass failed")
        return scored(self, window)

    monkeypatch.setattr(Rescorer, "log_ratios", broken)
    guarded_weights, guarded_rows, guarded_seen, _ = run(tiny_grpo_trainer, tmp_path / "with", True)
    assert rows == guarded_rows
    assert seen == guarded_seen
    assert all(torch.equal(weights[name], guarded_weights[name]) for name in weights)
    first, second = windows(tmp_path / "with")
    assert first["remark"] == "the forward pass failed"
    assert "pass_at_1_change" not in first
    assert (first["k"], first["outcome"]) == (4, "undetermined")
    assert first["pass_at_4"] is None, "no level is known after steps that no window has seen"
    assert not [name for name in first if "None" in name]
    assert (second["since"], second["windows"], second["missed"]) == (2, 1, 1)


def test_a_window_that_cannot_be_opened_leaves_the_angle(tmp_path, monkeypatch, caplog):
    def broken(self, *_):
        raise FailedRefresh("not finite")

    monkeypatch.setattr(Rescorer, "open", broken)
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        trained(tiny_lm_trainer, tmp_path, 3)
    assert [event["event"] for event in journal(tmp_path)].count("refresh") == 2
    assert not windows(tmp_path)
    assert "no window of the realised change begins here: not finite" in caplog.text


@pytest.mark.parametrize("reads", [True, False])
def test_a_model_that_reads_its_padding_has_no_realised_change(reads, tmp_path, monkeypatch, caplog):
    tried = []
    monkeypatch.setattr(rescoring_module, "reads_padding", lambda *_: tried.append(1) or reads)
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        trained(tiny_lm_trainer, tmp_path, 5, {"instruments": "change", "resample_refreshes": 1})
    refused = caplog.text.count("refresh failed: GuardError: Expected a model whose logits do not depend on padding")
    assert (refused, len(windows(tmp_path)), len(tried)) == ((3, 0, 3) if reads else (0, 2, 1))


def test_a_refresh_without_samples_leaves_the_window_open(tmp_path):
    def fails_once(completions, trainer_state, **_):
        if trainer_state.global_step == 2:
            raise ValueError("no verdict today")
        return digit_reward(completions)

    trained(tiny_lm_trainer, tmp_path, 5, {"correct": fails_once})
    assert [(event["since"], event["step"]) for event in windows(tmp_path)] == [(0, 4)]


def number_of(prompt):
    return 10 * int(prompt[0]) + int(prompt[2])


def with_gaps(prompts, completions, **_):
    """By prompt: no verdict, one verdict, all wrong, all right, every third without a verdict."""
    found, seen = [], dict[str, int]()
    for prompt, right in zip(prompts, digit_reward(completions), strict=True):
        place = seen[prompt] = seen.get(prompt, -1) + 1
        verdicts = [None, None if place else right, 0.0, 1.0, None if place % 3 == 1 else right]
        found.append(verdicts[number_of(prompt) % 5])
    return found


@pytest.mark.parametrize("kind", ["lm", "grpo"])
def test_samples_without_a_verdict_do_not_count(kind, tmp_path, monkeypatch):
    scored, seen = Rescorer.log_ratios, []

    def noting(self, window):
        seen.append((window, scored(self, window)))
        return seen[-1][1]

    monkeypatch.setattr(Rescorer, "log_ratios", noting)
    _, guard = trained(TRAINERS[kind], tmp_path, 3, {"correct": with_gaps, "probe_prompts": 40})
    (event,) = windows(tmp_path)
    ((window, log_ratios),) = seen
    kinds = torch.tensor([number_of(guard._change.prompt(key)) % 5 for key in window.keys])
    sizes = [(window.correct[kinds == kind] >= 0).sum(1).unique().tolist() for kind in range(5)]
    assert sizes == [[0], [1], [8], [8], [5]]
    assert window.correct[kinds == 2].unique().tolist() == [0]
    assert window.correct[kinds == 3].unique().tolist() == [1]
    assert (log_ratios[window.correct < 0] == 0).all()
    kept = kinds != 0
    assert event["prompts"] == int(kept.sum()) == 32
    expected = estimate_change(log_ratios[kept], window.correct[kept], 4)
    assert expected.num_prompts_k == 24, "a single verdict is too few for pass@4"
    for name in ("pass_at_1", "pass_at_1_se", "pass_at_k", "pass_at_k_se"):
        logged = name.replace("_at_k", "_at_4").replace("_se", "")
        assert event[logged + "_change" + "_se" * name.endswith("_se")] == getattr(expected, name)


def only_the_first(prompts, completions, **_):
    """A verdict on the first completion of a prompt alone."""
    firsts = {prompt: i for i, prompt in reversed(list(enumerate(prompts)))}
    right = digit_reward(completions)
    return [right[i] if firsts[prompt] == i else None for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    ("correct", "remark"),
    [
        (lambda completions, **_: [0.0] * len(completions), "no prompt has right and wrong samples"),
        (lambda completions, **_: [1.0] * len(completions), "no prompt has right and wrong samples"),
        (only_the_first, "Expected `k` samples or more of at least 3 prompts; found k=4"),
    ],
    ids=["all wrong", "all right", "one verdict a prompt"],
)
def test_verdicts_that_say_nothing_make_no_change(correct, remark, tmp_path):
    trainer, guard = trained(tiny_grpo_trainer, tmp_path, 5, {"correct": correct, "instruments": "change"})
    found = windows(tmp_path)
    assert [(event["since"], event["step"]) for event in found] == [(0, 2), (2, 4)]
    for event in found:
        assert remark in event["remark"]
        assert event["outcome"] == "undetermined"
        assert "pass_at_1_change" not in event
    assert guard.memory.change.sums.missed == 2
    assert trainer.state.global_step == 5


def test_without_any_verdict_no_window_is_closed(tmp_path):
    settings = {"correct": lambda completions, **_: [None] * len(completions), "instruments": "change"}
    trainer, _ = trained(tiny_grpo_trainer, tmp_path, 5, settings)
    assert not [event for event in windows(tmp_path) if "pass_at_1_change" in event]
    assert trainer.state.global_step == 5


def without_adapters(model):
    """A plain model with the same function: W + scaling B A in place of each adapted W."""
    plain, base = tiny_model(), model.get_base_model()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            where, _, kind = name.rpartition(".")
            layer = base.get_submodule(where)
            parameter.copy_(getattr(getattr(layer, "base_layer", layer), kind))
            if hasattr(layer, "lora_A") and kind == "weight":
                b, a = (part["default"].weight for part in (layer.lora_B, layer.lora_A))
                parameter.add_(layer.scaling["default"] * b @ a)
    return plain


def test_adapters_have_a_change_and_train_bit_for_bit_the_same(tmp_path, monkeypatch):
    from peft import LoraConfig

    def adapted(folder, **args):
        lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.1, init_lora_weights=False)
        torch.manual_seed(0)
        return tiny_grpo_trainer(folder, peft_config=lora, learning_rate=3e-3, **args)

    scored, both = Rescorer.log_ratios, []

    def noting(self, window):
        plain = dataclasses.replace(self, model=without_adapters(self.model))
        both.append((scored(self, window), scored(plain, window)))
        return both[-1][0]

    weights, rows, seen, _ = run(adapted, tmp_path / "without", False)
    monkeypatch.setattr(Rescorer, "log_ratios", noting)
    guarded_weights, guarded_rows, guarded_seen, _ = run(adapted, tmp_path / "with", True)
    assert rows == guarded_rows
    assert seen == guarded_seen
    assert all(torch.equal(weights[name], guarded_weights[name]) for name in weights)
    assert len(both) == len(windows(tmp_path / "with")) == 2
    for found, expected in both:
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert all(event["pass_at_1_change"] != 0 for event in windows(tmp_path / "with"))


def test_kept_samples_chain_their_windows(tmp_path):
    _, guard = trained(tiny_lm_trainer, tmp_path, 9, {"resample_refreshes": 2, "min_effective_samples": 0.01})
    found = windows(tmp_path)
    assert [(event["since"], event["step"]) for event in found] == [(0, 2), (0, 4), (4, 6), (4, 8)]
    assert [event["windows"] for event in found] == [1, 1, 2, 2]
    assert found[2]["pass_at_1_total"] == pytest.approx(found[1]["pass_at_1_change"] + found[2]["pass_at_1_change"])
    assert guard.memory.change.sums.windows == 2


def test_the_verdict_waits_for_the_end_of_a_window(tmp_path, monkeypatch):
    """Each check of kept samples sees the loss that the next one sees, too: one alarm, when the window is over."""
    looked = guard_module.RealisedChange.look

    def losing(self, rescorer, memory, step):
        found = looked(self, rescorer, memory, step)
        return (
            dataclasses.replace(found, verdict=dataclasses.replace(found.verdict, outcome="losing")) if found else None
        )

    monkeypatch.setattr(guard_module.RealisedChange, "look", losing)
    trained(tiny_lm_trainer, tmp_path, 7, {"resample_refreshes": 3, "min_effective_samples": 0.01})
    assert [event["step"] for event in journal(tmp_path) if event["event"] == "outcome"] == [6]


@pytest.mark.parametrize("how", ["float32", "weights", "autocast"])
def test_the_noise_of_a_model_that_rounds_is_measured_and_taken_off(how, tmp_path, monkeypatch):
    seen = []
    given = realised_module.estimate_change
    monkeypatch.setattr(realised_module, "estimate_change", lambda *a, **b: seen.append(b["noise"]) or given(*a, **b))
    trainer = tiny_lm_trainer(
        tmp_path,
        model=tiny_model().to(torch.bfloat16 if how == "weights" else torch.float32),
        max_steps=5,
        learning_rate=2e-3,
        bf16=how == "autocast",
    )
    guard_of(trainer)
    trainer.train()
    found = [event.get("log_ratio_noise") for event in windows(tmp_path)]
    assert found == seen
    assert len(found) == 2
    assert found == [None, None] if how == "float32" else all(0.001 < noise < 0.5 for noise in found)


def test_a_policy_that_moved_too_far_is_not_determined(tmp_path):
    trained(tiny_lm_trainer, tmp_path, 3, {"min_effective_samples": 1.0}, learning_rate=0.05)
    (event,) = windows(tmp_path)
    assert "below min_effective_samples=1: lower `refresh_steps`" in event["remark"]
    assert (event["outcome"], event["missed"]) == ("undetermined", 1)


def test_prompts_that_steer_the_projection_are_not_measured(tmp_path, monkeypatch):
    taken = []
    original = guard_module.Mitigator._steering

    def noted(self, refresh):
        taken.append(original(self, refresh))
        return taken[-1]

    monkeypatch.setattr(guard_module.Mitigator, "_steering", noted)
    trained(tiny_grpo_trainer, tmp_path, 3, {"mitigation": "project"})
    (event,) = windows(tmp_path)
    assert event["prompts"] == 3
    assert len(taken) == 2
    assert all(steering.tolist() == [True, True, True, False] * 3 for steering in taken)


@pytest.mark.parametrize(
    ("mitigation", "objective", "instruments", "measured"),
    [("auto", True, "both", 12), ("auto", False, "both", 3), ("both", True, "both", 3), ("project", False, "angle", 0)],
)
def test_what_is_measured_follows_from_what_was_chosen(mitigation, objective, instruments, measured, tmp_path):
    args = {"scale_rewards": "none", "loss_type": "dr_grpo", "num_generations": 8, "per_device_train_batch_size": 16}
    trainer = tiny_grpo_trainer(tmp_path, model=tiny_model(), max_steps=1, **args)
    config = GuardConfig(k=4, mitigation=mitigation, instruments=instruments)
    with PassKObjective(trainer, k=4) if objective else nullcontext():
        trainer.create_optimizer()
        mitigator = Mitigator(trainer, config, Ranks(torch.device("cpu")), print)
        try:
            assert int(mitigator.measured(12).sum()) == measured
        finally:
            mitigator.remove()
    assert NoMitigation().measured(12).all()


def test_a_floor_waits_for_the_window_of_its_samples(tmp_path):
    args = {"scale_rewards": "none", "loss_type": "dr_grpo", "num_generations": 8, "per_device_train_batch_size": 16}
    trainer = tiny_grpo_trainer(tmp_path, model=tiny_model(), max_steps=7, **args)
    guard = guard_of(trainer, mitigation="reweight", probe_prompts=24)
    seen = []

    class Notes(type(trainer.callback_handler.callbacks[0])):
        def on_step_end(self, args, state, control, **_):
            seen.append((guard.memory.floor_before, guard.memory.floor, objective.floor))

    with PassKObjective(trainer, k=4) as objective:
        trainer.add_callback(Notes)
        trainer.train()
    solved = [floor for _, floor, _ in seen if floor.precision]
    assert solved, "no floor was solved: the test says nothing"
    for before, _, in_force in seen:
        assert in_force == (before.floor if before.precision else None)
    refreshed = [now for (_, now, _) in seen[::2]]
    assert [before for before, _, _ in seen[2::2]] == refreshed[:-1]


def test_a_run_goes_on_with_the_window_of_its_checkpoint(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 3}
    _, whole = trained(tiny_lm_trainer, tmp_path / "whole", 7, **args)
    trainer = tiny_lm_trainer(tmp_path / "whole", model=tiny_model(), max_steps=7, learning_rate=2e-3, **args)
    guard = guard_of(trainer)
    before = windows(tmp_path / "whole")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert guard.memory.change == whole.memory.change
    again = windows(tmp_path / "whole")[len(before) :]
    timed = {"time", "probe_seconds"}
    assert [{k: v for k, v in e.items() if k not in timed} for e in again] == [
        {k: v for k, v in e.items() if k not in timed} for e in before[1:]
    ]


@pytest.mark.parametrize(("on_loss", "steps", "words"), [("stop", 5, "training stops: "), ("alert", 9, "")])
def test_a_loss_that_exceeds_what_is_accepted_is_an_alert_once(on_loss, steps, words, tmp_path, monkeypatch, caplog):
    looked, alerts = guard_module.RealisedChange.look, []

    def beyond(self, rescorer, memory, step):
        found = looked(self, rescorer, memory, step)
        verdict = None if found is None else dataclasses.replace(found.verdict, exceeded=step >= 4, newly=step == 4)
        return None if found is None else dataclasses.replace(found, verdict=verdict)

    monkeypatch.setattr(guard_module.RealisedChange, "look", beyond)
    monkeypatch.setattr(reporter_module, "send_alert", lambda title, text, *more: alerts.append((title, text)))
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        trainer, _ = trained(tiny_lm_trainer, tmp_path, 9, {"on_loss": on_loss, "max_loss": 0.05})
    assert trainer.state.global_step == steps
    line = f"passk_guard step 4: {words}the loss of pass@1 exceeds max_loss=0.05: pass@1 "
    assert caplog.text.count("exceeds max_loss=0.05") == 1
    assert line in caplog.text
    ((_, text),) = [alert for alert in alerts if "max_loss" in alert[0]]
    assert text.startswith(line)


def test_groups_have_a_change_of_their_own(tmp_path):
    rows = [row | {"level": "low" if i % 3 else "high"} for i, row in enumerate(probe_rows())]
    trained(tiny_lm_trainer, tmp_path, 3, {"probe": rows, "group_by": "level"})
    (event,) = windows(tmp_path)
    assert set(event["groups"]) == {"low", "high"}
    assert sum(group["num_prompts"] for group in event["groups"].values()) == 12
    assert sum(rate["share"] for rate in event["solve_rates"]) == pytest.approx(1.0)
    for prompt, change in event["lost"] + event["gained"]:
        assert prompt in {row["prompt"] for row in rows}
        assert change != 0


@pytest.mark.parametrize(
    ("rows", "setting", "message"),
    [
        (
            probe_rows(),
            "group_by",
            "Expected the column group_by='level' in every row of the probe; found none in row 0",
        ),
        (
            [row | {"level": i} for i, row in enumerate(probe_rows())],
            "group_by",
            "Expected at most 20 groups in the column group_by='level'; found 40",
        ),
        (probe_rows(), "cluster_by", "Expected the column cluster_by='level' in every row of the probe; found none in"),
        (
            [row | {"level": i % 2} for i, row in enumerate(probe_rows())],
            "cluster_by",
            "Expected at least 3 different values in the column cluster_by='level'; found 2",
        ),
    ],
)
def test_a_column_that_makes_no_groups_is_refused(rows, setting, message, tmp_path):
    with pytest.raises(GuardError, match=message):
        guard_of(tiny_lm_trainer(tmp_path), probe=rows, **{setting: "level"})


def test_clusters_reach_the_angle_the_evidence_and_the_change(tmp_path):
    """The same run with and without `cluster_by`: the same changes, other errors, and pairs of other prompts alone."""
    rows = [row | {"source": i // 4} for i, row in enumerate(probe_rows())]
    _, plain = trained(tiny_lm_trainer, tmp_path / "plain", 3, {"probe": rows})
    _, known = trained(tiny_lm_trainer, tmp_path / "known", 3, {"probe": rows, "cluster_by": "source"})
    assert {key for probe in known.memory.history for key in probe.prompt_keys} <= {str(i) for i in range(10)}
    assert [c.value for c in known.memory.evidence.checks] != [c.value for c in plain.memory.evidence.checks]
    (before,), (after,) = windows(tmp_path / "plain"), windows(tmp_path / "known")
    assert after["pass_at_1_change"] == before["pass_at_1_change"]
    assert after["pass_at_1_change_se"] != before["pass_at_1_change_se"]
    assert after["lost"] == before["lost"], "prompts keep their own names"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"instruments": "change", "source": "training_batch"}, "source='held_out' for instruments='change'"),
        ({"instruments": "change", "mitigation": "project"}, "mitigation='off' or 'hold' for instruments='change'"),
        ({"on_loss": "stop"}, "Expected `max_loss` for on_loss='stop'"),
        ({"max_loss": 1.5}, "max_loss"),
        ({"instruments": "sketch"}, "instruments"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        GuardConfig(**settings)


def test_the_training_batch_has_an_angle_alone_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="passk_guard"):
        trained(tiny_grpo_trainer, tmp_path, 3, {"source": "training_batch", "num_samples": 4, "probe": None})
    assert not windows(tmp_path)
    assert "from which no realised change can be measured" in caplog.text
