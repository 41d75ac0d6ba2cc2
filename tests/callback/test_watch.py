"""One line attaches the guard; without a trainer it waits for one, or says the two lines to write."""

import json
import re
from pathlib import Path

import pytest

import passk_guard
from passk_guard import GuardConfig, GuardError, PassKGuardCallback, PassKObjective
from tests.helpers.tiny import digit_reward, probe_rows, tiny_grpo_trainer, tiny_lm_trainer

SMALL = {"k": 4, "num_samples": 8, "probe_prompts": 12, "sketch_dim": 512, "probe_max_new_tokens": 4}


def guards(trainer):
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, PassKGuardCallback)]


def test_one_line_attaches_the_guard(tmp_path):
    trainer = tiny_lm_trainer(tmp_path)
    guard = passk_guard.watch(trainer, probe=probe_rows(), correct=digit_reward, **SMALL, mitigation="project")
    assert guards(trainer) == [guard]
    assert guard.config == GuardConfig(**SMALL, mitigation="project")


def test_settings_from_a_mapping_a_file_and_keywords_over_them(tmp_path):
    (tmp_path / "guard.yaml").write_text("passk_guard: {k: 4, patience: 3}\n")
    expected = GuardConfig(k=2, patience=3)
    for config in ({"k": 4, "patience": 3}, GuardConfig(k=4, patience=3), tmp_path / "guard.yaml"):
        assert GuardConfig.of(config, k=2) == expected
    assert GuardConfig.of(str(tmp_path / "guard.yaml")) == GuardConfig(k=4, patience=3)
    assert GuardConfig.of(expected) is expected
    assert GuardConfig.of() == GuardConfig()
    assert GuardConfig.of(advanced={"gate_confidence": 0.9}).advanced.gate_confidence == 0.9


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        ({"refresh_step": 5}, {}, "refresh_step: unknown setting; did you mean refresh_steps"),
        (None, {"num_sample": 8, "k": 1}, "k: .*num_sample: unknown setting; did you mean num_samples"),
        (None, {"gate_confidence": 0.9}, "this setting is now `advanced.gate_confidence`"),
        (None, {"k": 32}, "raise `num_samples` or lower `k`"),
        (8, {}, "found int. Settings can also be keywords"),
        ("nowhere.yaml", {}, "Cannot read nowhere.yaml"),
    ],
)
def test_settings_that_are_none_are_named_one_by_one(config, settings, words):
    with pytest.raises(GuardError, match=words):
        GuardConfig.of(config, **settings)


def test_a_guard_without_a_trainer_waits_for_the_objective(tmp_path):
    guard = PassKGuardCallback(probe=probe_rows(), correct=digit_reward, **SMALL)
    trainer = tiny_grpo_trainer(tmp_path, callbacks=[guard], scale_rewards="none", max_steps=1, num_generations=8)
    assert guard.waits
    guard.detach()
    with PassKObjective(trainer, k=4):
        assert not guard.waits
        trainer.train()
    assert any("passk_guard/pass_at_4" in row for row in trainer.state.log_history)
    start = json.loads((Path(trainer.args.output_dir) / "passk_guard.jsonl").read_text().splitlines()[0])
    assert start["objective"] == "pass@4 (PassKObjective)"
    assert start["model"] == "Qwen2ForCausalLM"
    assert start["probe"]["prompts"] == 40
    assert {"python", "torch", "transformers", "trl"} <= set(start["versions"])


def test_without_either_it_says_the_two_lines_to_write(tmp_path):
    trainer = tiny_lm_trainer(tmp_path)
    trainer.add_callback(PassKGuardCallback(probe=probe_rows(), correct=digit_reward, **SMALL))
    lines = re.escape("`guard = passk_guard.watch(trainer, probe=..., correct=..., k=8)` and then `trainer.train()`")
    with pytest.raises(GuardError, match="found NoneType.*" + lines):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(GuardError, match="found list.*" + lines):
        PassKGuardCallback(probe_rows(), digit_reward)
    with pytest.raises(GuardError, match="found NoneType.*" + lines):
        passk_guard.watch(None, probe=probe_rows(), correct=digit_reward)
