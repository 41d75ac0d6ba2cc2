"""Settings: the same from Python, YAML and a command line, and bounded everywhere."""

import dataclasses

import pytest

from passk_guard import GuardConfig, GuardError


def test_every_field_has_help():
    for field in dataclasses.fields(GuardConfig):
        assert len(field.metadata["help"]) > 15, field.name


@pytest.mark.parametrize(
    "values",
    [
        {"k": 1},
        {"k": 32},
        {"probe_prompts": 2},
        {"num_samples": 1},
        {"refresh_steps": 0},
        {"pool_refreshes": 0},
        {"threshold": 1},
        {"confidence": 0.5},
        {"confidence": 1},
        {"patience": 0},
        {"cooldown": 0},
        {"resample_refreshes": 0},
        {"min_effective_samples": 1.1},
        {"source": "elsewhere"},
        {"sketch_method": "identity"},
        {"sketch_dim": 8},
        {"probe_temperature": 0},
        {"probe_batch_size": 0},
        {"probe_seed": -1},
        {"unknown": 1},
    ],
)
def test_out_of_bounds(values):
    with pytest.raises((ValueError, TypeError)) as error:
        GuardConfig(**values)
    assert next(iter(values)) in str(error.value)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GuardConfig().k = 4


def test_yaml(tmp_path):
    path = tmp_path / "guard.yaml"
    path.write_text("k: 4\nnum_samples: 8\n")
    assert GuardConfig.from_yaml(path) == GuardConfig(k=4, num_samples=8)
    path.write_text("learning_rate: 1.0e-5\npassk_guard:\n  k: 4\n")
    assert GuardConfig.from_yaml(path) == GuardConfig(k=4)


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


def test_beside_trls_own_settings_on_one_command_line(tmp_path):
    from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

    parser = TrlParser((GuardConfig, ScriptArguments, GRPOConfig, ModelConfig))
    line = ["--k", "4", "--source", "training_batch", "--progress_bar", "false", "--seed", "7", "--temperature", "0.8"]
    line += ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    guard, _, grpo, _ = parser.parse_args_and_config(line)
    assert guard == GuardConfig(k=4, source="training_batch", progress_bar=False)
    assert (grpo.seed, grpo.temperature) == (7, 0.8)
    path = tmp_path / "run.yaml"
    path.write_text("probe_prompts: 32\nuse_cpu: true\nbf16: false\n")
    guard, _, _, _ = parser.parse_args_and_config(["--config", str(path), "--output_dir", str(tmp_path)])
    assert guard == GuardConfig(probe_prompts=32)
