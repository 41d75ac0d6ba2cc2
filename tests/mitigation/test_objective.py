"""The pass@k objective inside TRL's trainers."""

import logging

import pytest
import torch

from passk_guard import GuardError, PassKObjective, passk_advantages
from passk_guard.passk import max_at_k_advantages
from tests.helpers.tiny import digit_reward, tiny_grpo_trainer, tiny_lm_trainer, tiny_model, tiny_rloo_trainer

GRPO = {"scale_rewards": "none", "loss_type": "dr_grpo"}


@pytest.mark.parametrize("make", [tiny_grpo_trainer, tiny_rloo_trainer])
@pytest.mark.parametrize("bounds", [{}, {"floor": 0.5}, {"floor": 0.5, "cap": 1.0}])
def test_the_loss_sees_pass_at_k_advantages(make, bounds, tmp_path):
    trainer = make(tmp_path, **(GRPO if make is tiny_grpo_trainer else {}))
    seen = []
    original = trainer._compute_loss

    def loss(model, inputs):
        seen.append(inputs["advantages"].clone())
        return original(model, inputs)

    trainer._compute_loss = loss
    rewards = []
    objective = PassKObjective(trainer, k=3, **bounds)
    with objective:
        replaced = trainer._calculate_rewards

        def keep(*args, **kwargs):
            rewards.append(replaced(*args, **kwargs))
            return rewards[-1]

        trainer._calculate_rewards = keep
        trainer.train()
    del trainer._calculate_rewards
    assert len(seen) == 2
    for advantages, reward in zip(seen, rewards, strict=True):
        expected = passk_advantages(reward[:, 0].view(-1, 4), 3, **bounds).view(-1)
        assert torch.allclose(advantages.sort().values, expected.sort().values)  # the trainer shuffles its batch
        assert bool(expected.any())
    logged = torch.tensor(list(trainer._logs["advantages"]))
    assert torch.allclose(logged.sort().values, seen[-1].sort().values), "the table of completions shows what was used"


def test_k_1_trains_exactly_like_rloo(tmp_path):
    plain = tiny_rloo_trainer(tmp_path / "rloo")
    plain.train()
    one = tiny_rloo_trainer(tmp_path / "pass1")
    with PassKObjective(one, k=1):
        one.train()
    for a, b in zip(plain.model.parameters(), one.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-7)


def test_it_is_gone_after_the_run(tmp_path):
    trainer = tiny_grpo_trainer(tmp_path, **GRPO)
    before = trainer._generate_and_score_completions
    objective = PassKObjective(trainer, k=2).install()
    with pytest.raises(GuardError, match="already patched"):
        PassKObjective(trainer, k=2).install()
    objective.remove()
    assert trainer._generate_and_score_completions == before
    PassKObjective(trainer, k=2).install().remove()


def test_missing_rewards(tmp_path):
    objective = PassKObjective(tiny_grpo_trainer(tmp_path, **GRPO), k=3)
    nan = float("nan")
    rewards = torch.tensor([1.0, 0, 0, nan, 1.0, nan, nan, 0])
    found = objective.advantages(rewards, 4)
    assert torch.allclose(found[:3], passk_advantages(torch.tensor([[1.0, 0, 0]]), 3)[0])
    assert not found[3:].any(), "a sample without a reward, and a group with fewer than k"


def test_rewards_with_partial_credit(tmp_path):
    trainer = tiny_grpo_trainer(tmp_path, **GRPO)
    objective = PassKObjective(trainer, k=3, threshold=None)
    nan, inf = float("nan"), float("inf")
    found = objective.advantages(torch.tensor([0.2, 0.9, 0.2, nan, 0.1, inf, nan, 0, 1.0, 0.5, 0, 0.5]), 4)
    assert torch.allclose(found[:3], max_at_k_advantages(torch.tensor([[0.2, 0.9, 0.2]]), 3)[0])
    assert not found[3:8].any(), "a sample without a finite reward, and a group with fewer than k"
    assert torch.allclose(found[8:], max_at_k_advantages(torch.tensor([[1.0, 0.5, 0, 0.5]]), 3)[0])
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with objective:
        trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_evaluation_keeps_its_own_advantages(tmp_path):
    trainer = tiny_grpo_trainer(tmp_path, **GRPO)
    inputs = [{"prompt": "1+1=", "answer": "2"}] * 4
    with PassKObjective(trainer, k=4):
        trainer.model.eval()
        torch.manual_seed(0)
        evaluated = trainer._generate_and_score_completions(inputs)["advantages"]
    torch.manual_seed(0)
    plain = trainer._generate_and_score_completions(inputs)["advantages"]
    assert torch.equal(evaluated, plain)


def second(completions, **_):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("args", "k", "more", "words"),
    [
        (GRPO, 5, {}, "num_generations=4"),
        (GRPO, 0, {}, "k=0"),
        ({"scale_rewards": "group"}, 2, {}, "scale_rewards='none'"),
        ({"scale_rewards": "batch"}, 2, {}, "scale_rewards='none'"),
        (GRPO | {"reward_funcs": [digit_reward, second]}, 2, {}, "'second'"),
        (GRPO, 2, {"correct": "accuracy"}, "'accuracy'"),
        (GRPO, 2, {"threshold": None, "floor": 0.5}, "threshold=None; found floor=0.5"),
    ],
)
def test_settings_that_would_make_it_wrong_are_refused(args, k, more, words, tmp_path):
    with pytest.raises(GuardError) as error:
        PassKObjective(tiny_grpo_trainer(tmp_path, **args), k=k, **more)
    assert words in str(error.value)


def test_rloo_normalisation_and_other_trainers_are_refused(tmp_path):
    with pytest.raises(GuardError, match="normalize_advantages"):
        PassKObjective(tiny_rloo_trainer(tmp_path, normalize_advantages=True), k=2)
    with pytest.raises(GuardError, match="GRPOTrainer or RLOOTrainer"):
        PassKObjective(tiny_lm_trainer(tmp_path, model=tiny_model()), k=2)


def test_one_of_several_reward_functions(tmp_path):
    trainer = tiny_grpo_trainer(tmp_path, reward_funcs=[second, digit_reward], **GRPO)
    with PassKObjective(trainer, k=2, correct="digit_reward") as objective:
        trainer.train()
    assert objective._rewards.any()


def test_a_loss_that_divides_by_length_is_warned_about(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="passk_guard"):
        PassKObjective(tiny_grpo_trainer(tmp_path, scale_rewards="none", loss_type="grpo"), k=2)
    assert "dr_grpo" in caplog.text
