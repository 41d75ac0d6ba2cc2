"""The plain engine in one process, and DistributedDataParallel over 2 and 3: equal to textbook PyTorch."""

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from tests.distributed.launch import launch
from tests.helpers.tiny import tiny_grpo_trainer, tiny_model, tiny_trainer
from tests.mitigation.engines import oracle
from tests.mitigation.engines.guarded import FixedTrainer, Projecting, train_guarded
from tests.mitigation.engines.native_worker import CASES, PROBED, recipe_of

WORKER = "tests.mitigation.engines.native_worker"
PLAIN = [case for case in CASES if case not in ("static", "bucket_view")]


def tolerance(case):
    """Relative to the update. float32 differs from itself in float64 by 1e-6 in these runs."""
    return 1e-6 if case.startswith("float32") else 1e-13


def check_against_oracle(found, case, ranks):
    recipe = recipe_of(case, ranks)
    model, history = oracle.train(recipe)
    assert all(step["coefficient"] > 0.1 for step in history), "every step must be edited"
    start = oracle.weights(oracle.build_model(recipe))
    assert oracle.relative_error(found["weights"], oracle.weights(model), start) < tolerance(case)
    for step, expected in zip(found["history"], history, strict=True):
        assert step["coefficient"] == pytest.approx(expected["coefficient"], rel=100 * tolerance(case))
        for product in ("gp", "gg", "pp"):
            size = (expected["gg"] * expected["pp"]) ** 0.5
            assert abs(step[product] - expected[product]) < 100 * tolerance(case) * max(size, expected[product])


def plain(case, folder, **options):
    recipe = recipe_of(case, 1, **{key: options.pop(key) for key in ("gamma",) if key in options})
    return train_guarded(recipe, 0, folder, **CASES[case][1], **options)


@pytest.mark.parametrize("case", PLAIN)
def test_one_process_equals_the_textbook(case, tmp_path):
    trainer, guard = plain(case, tmp_path)
    assert guard.engine.name == "plain"
    check_against_oracle({"weights": oracle.weights(trainer.model), "history": guard.history}, case, 1)


@pytest.mark.parametrize("case", ["float32_adamw", "unused", "reentrant", "lora"])
def test_a_probe_changes_nothing_in_one_process(case, tmp_path):
    without, _ = plain(case, tmp_path, gamma=None)
    probed, guard = plain(case, tmp_path, edit=False)
    assert len(guard.history) == 3
    assert oracle.weights(without.model).keys() == oracle.weights(probed.model).keys()
    for (name, expected), found in zip(without.model.named_parameters(), probed.model.parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_the_loss_scale_of_fp16_cancels(tmp_path):
    recipe = oracle.Recipe(dtype="float64", max_norm=1e9)  # the scaler alone, without autocast: clipping is no part
    trainer = FixedTrainer(recipe, 0, tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    guard = Projecting(trainer, oracle.probe_batches(recipe, 0), dtype=torch.float64)
    trainer.add_callback(guard)
    trainer.train()
    model, history = oracle.train(recipe)
    start = oracle.weights(oracle.build_model(recipe))
    assert oracle.relative_error(oracle.weights(trainer.model), oracle.weights(model), start) < 1e-13
    assert guard.engine.loss_scale() == 2.0**10
    for step, expected in zip(guard.history, history, strict=True):
        assert step["gg"] == pytest.approx(2.0**20 * expected["gg"])
        assert step["pp"] == pytest.approx(expected["pp"]), "the probe gradient is not multiplied by the scale"


def test_removing_leaves_no_trace(tmp_path):
    trainer, guard = plain("float32_adamw", tmp_path)
    plain_trainer, _ = plain("float32_adamw", tmp_path, gamma=None)
    assert vars(trainer.accelerator).keys() == vars(plain_trainer.accelerator).keys()
    assert "backward" not in vars(trainer.accelerator)
    for module, other in zip(trainer.model.modules(), plain_trainer.model.modules(), strict=True):
        assert vars(module).keys() == vars(other).keys()
        assert list(module._parameters) == list(other._parameters)
    guard.engine.remove()  # twice does nothing


# TRL


class TextbookGRPO(GRPOTrainer):
    """GRPO with the edit written out after the backward pass, on a copy of the model."""

    def training_step(self, model, inputs, num_items_in_batch):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            twin = tiny_model()
            twin.load_state_dict(self.model.state_dict())
            for batch in oracle.probe_batches(oracle.Recipe(), 0):
                oracle.probe_loss(twin, batch).backward()
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            directions = [p.grad for p in twin.parameters() if p.requires_grad]
            g, p = oracle.flat([p.grad for p in parameters]), oracle.flat(directions)
            coefficient = oracle.design_coefficient(float(g @ p), float(g @ g), float(p @ p), 0.2)
            assert coefficient > 0
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.grad += coefficient * direction
        return loss


def grpo_weights(trainer, **probe):
    if probe:
        trainer.add_callback(Projecting(trainer, oracle.probe_batches(oracle.Recipe(), 0), **probe))
    trainer.train()
    return [p.detach().clone() for p in trainer.model.parameters()]


SETTINGS = {"max_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}


@pytest.mark.parametrize("reentrant", [True, False])
def test_grpo_equals_the_edit_written_out(reentrant, tmp_path):
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    settings = SETTINGS | checkpointing
    found = grpo_weights(tiny_grpo_trainer(tmp_path, **settings), gamma=0.2)
    expected = grpo_weights(tiny_trainer(TextbookGRPO, GRPOConfig, tmp_path, **settings))
    without = grpo_weights(tiny_grpo_trainer(tmp_path, **settings))
    update = (oracle.flat(expected) - oracle.flat(without)).norm()
    assert (oracle.flat(found) - oracle.flat(expected)).norm() < 1e-6 * update


def test_grpo_with_coefficient_zero_is_bit_for_bit_the_same(tmp_path):
    without = grpo_weights(tiny_grpo_trainer(tmp_path, **SETTINGS))
    for found, expected in zip(
        grpo_weights(tiny_grpo_trainer(tmp_path, **SETTINGS), coefficient=0.0), without, strict=True
    ):
        assert torch.equal(found, expected)


# Several ranks


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_ddp_equals_the_textbook(ranks, tmp_path):
    found = launch("ddp", tmp_path, ranks, worker=WORKER)
    for case in CASES:
        assert found[0][case]["engine"] == "ddp"
        assert all(other[case] == found[0][case] for other in found), "ranks must stay equal, bit for bit"
        check_against_oracle(found[0][case], case, ranks)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_probe_changes_nothing_under_ddp(ranks, tmp_path):
    for rank in launch("ddp_probing", tmp_path, ranks, worker=WORKER):
        for case in PROBED:
            without, probed = rank[case]
            assert len(probed["history"]) == 3
            assert without["weights"] == probed["weights"], case


@pytest.mark.distributed
def test_a_loss_that_fails_on_one_rank_leaves_nobody_waiting(tmp_path):
    first, second = launch("ddp_loss_fails", tmp_path, 2, worker=WORKER)
    known = "FailedRefresh: the probe loss raised on another rank; its log has the reason"
    for where in ("between", "forward", "backward"):
        assert first[where]["errors"] == [known] * 3
        assert second[where]["errors"] == ["ValueError: this batch is broken"] * 3
        for rank in (first, second):
            assert rank[where]["weights"] == rank["None"]["weights"]


@pytest.mark.distributed
def test_grpo_under_ddp(tmp_path):
    first, second = launch("grpo", tmp_path, 2, worker=WORKER)
    assert first == second
    assert first["0.0"] == first["None"]
    assert first["0.5"] != first["None"], "the optimizer must have seen the edit"
