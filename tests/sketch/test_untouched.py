"""A pass leaves the model, its gradients and the random state exactly as it found them."""

import pytest
import torch
from torch import nn

from passk_guard.sketch import ScoreSketcher
from tests.helpers.tiny import tiny_model
from tests.sketch.models import VOCAB, BrokenLM, RestlessLM
from tests.sketch.oracle import ragged_batch

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def snapshot(model):
    return {
        "weights": [p.detach().clone() for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "grad objects": [id(p.grad) for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [len(getattr(m, name)) for m in model.modules() for name in HOOKS],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "checkpointing": [id(vars(m).get("_gradient_checkpointing_func")) for m in model.modules()],
        "dropout": [m.p for m in model.modules() if isinstance(m, nn.Dropout)],
        "config": str(getattr(model, "config", None)),
        "rng": torch.get_rng_state(),
    }


def assert_same(before, after):
    for name, value in before.items():
        if name in ("weights", "grads"):
            same = all((a is None and b is None) or torch.equal(a, b) for a, b in zip(value, after[name], strict=True))
        else:
            same = torch.equal(value, after[name]) if torch.is_tensor(value) else value == after[name]
        assert same, name


def mixed_state(model):
    """Some weights frozen, gradients on some, one module in eval: nothing that a blanket call would restore."""
    parameters = list(model.parameters())
    parameters[1].requires_grad_(False)
    parameters[2].grad = torch.randn_like(parameters[2])
    model.train()
    next(m for m in model.modules() if isinstance(m, nn.Linear)).eval()
    return model


@pytest.mark.parametrize("use_reentrant", [None, True, False])
@pytest.mark.parametrize("method", ["kronecker", "countsketch"])
def test_nothing_is_left_behind(method, use_reentrant):
    model = mixed_state(tiny_model("qwen2", attention_dropout=0.2))
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    before = snapshot(model)
    sketcher = ScoreSketcher(model, dim=256, method=method)
    sketcher.sketch(**ragged_batch(), num_slots=6)
    sketcher.reseed(1)
    sketcher.sketch(**ragged_batch(), num_slots=6)
    assert_same(before, snapshot(model))


def test_nothing_is_left_behind_when_the_forward_raises():
    torch.manual_seed(0)
    model = mixed_state(BrokenLM())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        ScoreSketcher(model, dim=64).sketch(**ragged_batch(vocab=VOCAB), num_slots=6)
    assert_same(before, snapshot(model))


def test_random_numbers_that_the_forward_draws_are_given_back():
    torch.manual_seed(0)
    sketcher, before = ScoreSketcher(RestlessLM(), dim=64), torch.get_rng_state()
    sketcher.sketch(**ragged_batch(vocab=VOCAB), num_slots=6)
    assert torch.equal(before, torch.get_rng_state())


def test_the_next_training_step_is_the_same_bit_for_bit():
    losses = []
    for sketched in (False, True):
        model = tiny_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3).train()
        torch.manual_seed(3)
        if sketched:
            ScoreSketcher(model, dim=64).sketch(**ragged_batch(), num_slots=6)
        ids = ragged_batch()["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        losses.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*losses)


def test_a_sketch_inside_no_grad_still_works():
    model, batch = tiny_model("qwen2"), ragged_batch()
    sketcher = ScoreSketcher(model, dim=64)
    with torch.no_grad():
        inside = sketcher.sketch(**batch, num_slots=6)
    assert torch.equal(inside, sketcher.sketch(**batch, num_slots=6))
