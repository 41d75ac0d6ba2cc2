"""The angle of what a run trains on itself: which weights a trainer has, and the number against loops over groups."""

import itertools
import json

import pytest
import torch

import passk_guard
from passk_guard import PassKObjective
from passk_guard.callback.objective_angle import measure_objective, weighting_of
from passk_guard.config import GuardConfig
from passk_guard.probe.verifier import Verifier
from tests.callback.test_guard import FixedSampler
from tests.helpers.populations import draw, population
from tests.helpers.tiny import (
    digit_reward,
    probe_rows,
    tiny_grpo_trainer,
    tiny_lm_trainer,
    tiny_model,
    tiny_rloo_trainer,
)

DR = {"scale_rewards": "none", "loss_type": "dr_grpo", "num_generations": 4}


def other_reward(completions, **_):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("make", "args", "name"),
    [
        (tiny_grpo_trainer, {"num_generations": 4}, "grpo in groups of 4"),
        (tiny_grpo_trainer, DR, "rloo"),
        (tiny_grpo_trainer, {"scale_rewards": "batch"}, "rloo"),
        (tiny_grpo_trainer, DR | {"multi_objective_aggregation": "normalize_then_sum"}, "grpo in groups of 4"),
        (tiny_rloo_trainer, {"normalize_advantages": True}, "rloo"),
        (tiny_lm_trainer, {}, None),
    ],
)
def test_the_weights_follow_from_the_trainers_settings(make, args, name, tmp_path):
    found = weighting_of(make(tmp_path, **args), Verifier(digit_reward))
    assert (found and found.name) == name
    assert weighting_of(make(tmp_path, **args), Verifier(other_reward)) is None, "of other rewards"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"k": 2}, "passk:2"),
        ({"k": 4, "floor": 0.5}, "passk:4,floor=0.5 in groups of 4"),
        ({"k": 1}, "passk:1"),
        ({"k": 2, "threshold": 0.5}, None),
    ],
)
def test_an_installed_objective_decides(settings, name, tmp_path):
    trainer = tiny_grpo_trainer(tmp_path, **DR)
    with PassKObjective(trainer, **settings):
        found = weighting_of(trainer, Verifier(digit_reward))
    assert (found and found.name) == name
    assert weighting_of(trainer, Verifier(digit_reward)).name == "rloo"


def test_a_run_has_the_angle_of_its_own_objective(tmp_path):
    """Against TRL's advantages of each group of 4 among 8 samples, and sums over pairs of prompts."""
    model = tiny_model(initializer_range=0.05)
    trainer = tiny_grpo_trainer(tmp_path, model=model, max_steps=1, num_generations=4, per_device_train_batch_size=4)
    sampler = FixedSampler(trainer.processing_class, lambda row: 0.1 + 0.6 * ("-3" in row["prompt"]))
    settings = {"k": 4, "num_samples": 8, "probe_prompts": 40, "refresh_steps": 1, "sketch_dim": 1024}
    guard = passk_guard.watch(trainer, probe=probe_rows(), correct=digit_reward, sampler=sampler, **settings)
    trainer.train()
    (probe,) = guard.memory.history
    m, rows = len(probe.num_samples), []
    for n, c in zip(probe.num_samples.tolist(), probe.num_correct.tolist(), strict=True):
        rewards, total = torch.tensor([1.0] * c + [0.0] * (n - c), dtype=torch.float64), torch.zeros(n).double()
        groups = list(itertools.combinations(range(n), 4))
        for group in groups:
            of_group = rewards[list(group)]
            total[list(group)] += (of_group - of_group.mean()) / (of_group.std() + 1e-4) / 4
        total /= len(groups)
        rows.append([float(total[0]) if c else 0.0, float(total[-1]) if c < n else 0.0])
    own = torch.tensor(rows, dtype=torch.float64).T.flatten()
    n, c = probe.num_samples.double(), probe.num_correct.double()
    one = torch.cat([n - c, -c]) / (n * (n - 1)).repeat(2)

    def inner(left, right):
        products = (left[:, None] * probe.gram * right).view(2, m, 2, m).sum((0, 2))
        return float(products.sum() - products.trace()) / (m * (m - 1))

    name, found = measure_objective(trainer, guard._verifier, [probe], guard.config)
    assert name == "grpo in groups of 4"
    assert found.inner_product == pytest.approx(inner(own, one), rel=1e-9)
    assert found.normk_sq == pytest.approx(inner(own, own), rel=1e-9)
    (event,) = [e for e in map(json.loads, (tmp_path / "passk_guard.jsonl").open()) if e["event"] == "refresh"]
    assert event["objective"] == {"name": name, "status": found.status, "reason": found.reason}
    row = next(row for row in trainer.state.log_history if "passk_guard/objective_cosine" in row)
    assert row["passk_guard/objective_cosine"] == event["objective_cosine"] == found.cosine
    assert row["passk_guard/objective_cosine_ci_low"] <= found.cosine <= row["passk_guard/objective_cosine_ci_high"]


def test_an_objective_of_more_samples_than_the_probe_has_no_angle(tmp_path):
    trainer = tiny_grpo_trainer(tmp_path, **DR | {"num_generations": 16, "per_device_train_batch_size": 16})
    probe = draw(population(-0.5), 20, 8, torch.Generator().manual_seed(0))
    for k, known in ((2, True), (12, False)):
        with PassKObjective(trainer, k=k):
            found = measure_objective(trainer, Verifier(digit_reward), [probe], GuardConfig(k=4))
        assert (found is not None) == known
