"""The README's code runs, and its names exist."""

import re
from pathlib import Path

import passk_guard
from passk_guard.config import Advanced, GuardConfig
from passk_guard.reporting.log_rows import estimate_metrics
from tests.helpers.tiny import digit_reward, probe_rows, tiny_grpo_trainer

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_python_blocks_run(tmp_path):
    code = blocks("python")
    assert len(code) == 2
    trainer = tiny_grpo_trainer(tmp_path, num_generations=8, scale_rewards="none", max_steps=1)
    for block in code:
        exec(block, {"trainer": trainer})
    assert trainer.state.global_step == 1


def test_the_diff_of_a_users_loop_runs(tmp_path):
    added = [line[2:] for line in blocks("diff")[0].splitlines() if line.startswith("+ ")]
    trainer = tiny_grpo_trainer(tmp_path, max_steps=1)
    names = {"trainer": trainer, "held_out": probe_rows(), "accuracy": digit_reward}
    exec("\n".join(added), names | {"passk_guard": passk_guard})
    trainer.train()
    assert any("passk_guard/pass_at_8" in row for row in trainer.state.log_history)


def test_metric_names_are_documented():
    from tests.reporting.test_reporter import CONFLICT

    for name in estimate_metrics(CONFLICT, "conflict"):
        stem = name.removesuffix("_se")
        assert f"`{stem}`" in README, name


def test_names_in_the_readme_exist():
    settings = "patience probe_prompts pool_refreshes num_samples failed_refresh_alert refresh_steps sketch_dim"
    settings += " floor_gamma floor_max image_refreshes instruments group_by cluster_by on_loss max_loss verbosity"
    for name in settings.split():
        assert re.search(rf"`{name}[`=]", README), name
        assert name in GuardConfig.__dataclass_fields__
    for name in ("floor_average", "gate_confidence", "protected_average"):
        assert f"`advanced.{name}`" in README
        assert name in Advanced.__dataclass_fields__
    numbers = "floor floor_solved floor_se weight_ratio weight_ratio_bound train_cosine mitigated"
    for name in numbers.split():
        assert f"`{name}`" in README, name
    for name in re.findall(r"from passk_guard import (.+)", README):
        assert all(hasattr(passk_guard, part.strip()) for part in name.split(","))


def test_commands_in_the_readme_exist():
    root = Path(__file__).parents[2]
    for module in re.findall(r"python -m ([\w.]+)", README):
        path = root / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", README, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_commands_and_pictures_exist():
    from passk_guard.cli import main

    for command in ("report", "plan", "analyze", "check", "schema"):
        assert f"passk-guard {command}" in README
        assert main([command, "--help"]) == 0
    root = Path(__file__).parents[2]
    for path in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (root / path).is_file(), path
