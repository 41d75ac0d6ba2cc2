"""Settings: the same from Python, YAML and a command line, and bounded everywhere."""

import dataclasses

import pytest

from passk_guard import Advanced, GuardConfig, GuardError
from passk_guard.config import config_problems, config_schema


@pytest.mark.parametrize("kind", [GuardConfig, Advanced])
def test_every_field_has_help(kind):
    for field in dataclasses.fields(kind):
        assert len(field.metadata["help"]) > 15, field.name
        assert ";" not in field.metadata["help"], field.name


REFUSED = {
    "k": [1, 32, 2.5, True],
    "probe_prompts": [2],
    "num_samples": [1],
    "refresh_steps": [0, True, 2**31],
    "pool_refreshes": [0],
    "threshold": [1, float("nan")],
    "confidence": [0.5, 1],
    "patience": [0],
    "cooldown": [0],
    "resample_refreshes": [0],
    "min_effective_samples": [0, 1.1],
    "source": ["elsewhere"],
    "sketch_method": ["identity"],
    "sketch_dim": [8],
    "probe_temperature": [0, float("inf")],
    "probe_batch_size": [0],
    "probe_seed": [-1, 2**63],
    "unknown": [1],
    "advanced": [{"gate_confidence": 0.5}, {"alert_rule": "never"}, {"floor_average": True}, {"unknown": 1}, "{", 3],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_out_of_bounds(name, value):
    with pytest.raises((ValueError, TypeError)) as error:
        GuardConfig(**{name: value})
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "training_batch", "resample_refreshes": 2}, "resample_refreshes=1"),
        ({"source": "training_batch", "mitigation": "project"}, "source='held_out'"),
        ({"floor_max": 9.0}, "`floor_max` <= k"),
    ],
)
def test_settings_that_do_not_fit_together(settings, words):
    with pytest.raises(ValueError, match=words):
        GuardConfig(**settings)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GuardConfig().k = 4


def test_yaml(tmp_path):
    path = tmp_path / "guard.yaml"
    path.write_text("k: 4\nnum_samples: 8\nmitigation: off\n")
    assert GuardConfig.from_yaml(path) == GuardConfig(k=4, num_samples=8)
    path.write_text("learning_rate: 1.0e-5\npassk_guard:\n  k: 4\n  advanced: {gate_confidence: 0.9}\n")
    assert GuardConfig.from_yaml(path) == GuardConfig(k=4, advanced=Advanced(gate_confidence=0.9))


@pytest.mark.parametrize(
    ("text", "words"),
    [("k: 400\n", "num_samples"), ("- k\n", "mapping"), ("speed: 3\n", "speed"), ("k: [\n", "Cannot read")],
)
def test_yaml_that_is_wrong(tmp_path, text, words):
    path = tmp_path / "guard.yaml"
    path.write_text(text)
    with pytest.raises(GuardError, match=words):
        GuardConfig.from_yaml(path)
    with pytest.raises(GuardError, match="nowhere"):
        GuardConfig.from_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("name", "value", "place"),
    [
        ("alert_rule", "each_look", "advanced.alert_rule"),
        ("gate_confidence", 0.9, "advanced.gate_confidence"),
        ("protected_average", 0.5, "advanced.protected_average"),
        ("floor_average", 0.5, "advanced.floor_average"),
        ("void_alert", 5, "failed_refresh_alert"),
    ],
)
def test_a_name_of_an_earlier_version_is_answered_with_the_new_one(name, value, place, tmp_path):
    words = f"{name}: this setting is now `{place}`"
    with pytest.raises(ValueError, match=words):
        GuardConfig(**{name: value})
    for file, text in (("guard.yaml", f"{name}: {value}\nk: 1\n"), ("guard.json", f'{{"{name}": 1, "k": 1}}')):
        path = tmp_path / file
        path.write_text(text)
        with pytest.raises(GuardError, match=words):
            GuardConfig.from_yaml(path)
        first, second = config_problems(path)
        assert first.startswith(words)
        assert second == "k: Input should be greater than or equal to 2; found 1"


def test_a_misspelt_advanced_setting_is_named_with_its_place(tmp_path):
    path = tmp_path / "guard.yaml"
    path.write_text("gate_confidance: 0.9\nadvanced:\n  alert-rule: each_look\n  floor_average: 2\n")
    assert sorted(config_problems(path)) == [
        "advanced.alert-rule: unknown setting; did you mean advanced.alert_rule?",
        "advanced.floor_average: Input should be less than 1; found 2",
        "gate_confidance: unknown setting; did you mean advanced.gate_confidence or confidence?",
    ]


def test_the_schema_describes_the_advanced_settings():
    schema = config_schema()["$defs"]["Advanced"]
    assert schema["properties"]["alert_rule"]["enum"] == ["whole_run", "each_look"]
    assert all(len(value["description"]) > 15 for value in schema["properties"].values())
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("place", [{}, {"alert_rule": "each_look"}, {"advanced": {"alert_rule": "each_look", "x": 1}}])
def test_settings_in_a_journal_of_another_version(place):
    config = GuardConfig.from_journal({"k": 4, "void_alert": 5, "novelty": 1} | place)
    rule = "each_look" if place else "whole_run"
    assert config == GuardConfig(k=4, failed_refresh_alert=5, advanced=Advanced(alert_rule=rule))


def test_beside_trls_own_settings_on_one_command_line(tmp_path):
    from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

    parser = TrlParser((GuardConfig, ScriptArguments, GRPOConfig, ModelConfig))
    line = ["--k", "4", "--source", "training_batch", "--progress_bar", "false", "--seed", "7", "--temperature", "0.8"]
    line += ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    line += ["--advanced", '{"floor_average": 0.5}']
    guard, _, grpo, _ = parser.parse_args_and_config(line)
    assert guard == GuardConfig(k=4, source="training_batch", progress_bar=False, advanced=Advanced(floor_average=0.5))
    assert (grpo.seed, grpo.temperature) == (7, 0.8)
    path = tmp_path / "run.yaml"
    path.write_text("probe_prompts: 32\nadvanced: {floor_average: 0.5}\nuse_cpu: true\nbf16: false\n")
    guard, _, _, _ = parser.parse_args_and_config(["--config", str(path), "--output_dir", str(tmp_path)])
    assert guard == GuardConfig(probe_prompts=32, advanced=Advanced(floor_average=0.5))
