"""A probe that changes everything it can reach, and a run that does not notice."""

import logging
import random

import numpy as np
import pytest
import torch

from passk_guard.utils.isolation import seeded, untouched
from tests.helpers.tiny import disable_checkpointing, enable_checkpointing, tiny_model, tiny_tokenizer


def draws():
    """Next numbers of every generator, taken without moving them on."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    values = random.random(), np.random.rand(), torch.rand(1).item()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return values


def state(model, tokenizer):
    """All that must hold still, by value or by identity."""
    return (
        draws(),
        [m.training for m in model.modules()],
        [(p.requires_grad, id(p.grad)) for p in model.parameters()],
        [vars(m).get("gradient_checkpointing") for m in model.modules()],
        [id(vars(m).get("_gradient_checkpointing_func")) for m in model.modules()],
        (id(model.generation_config), repr(vars(model.generation_config))),
        vars(model.config).get("use_cache", "absent"),
        (tokenizer.padding_side, tokenizer.truncation_side),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
    )


def training_model():
    """A model in the middle of training: mixed modes, some frozen weights, some gradients, checkpointing on."""
    model = tiny_model()
    enable_checkpointing(model)
    model.train()
    model.model.layers[0].eval()
    parameters = list(model.parameters())
    parameters[1].requires_grad_(False)
    parameters[2].grad = torch.ones_like(parameters[2])
    return model


def disturb(model, tokenizer):
    random.random(), np.random.rand(3), torch.rand(3)
    model.eval()
    model.model.layers[0].train()
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
        parameter.grad = torch.zeros_like(parameter)
    disable_checkpointing(model)
    disable_checkpointing(model)
    model.generation_config.temperature = 0.1
    model.generation_config.invented = 1
    model.generation_config = type(model.generation_config)()
    model.config.use_cache = not model.config.use_cache
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = not torch.backends.cudnn.deterministic


@pytest.mark.parametrize("raising", [False, True])
def test_everything_is_put_back(raising):
    model, tokenizer = training_model(), tiny_tokenizer(padding_side="left")
    before = state(model, tokenizer)
    try:
        with untouched(model, tokenizer):
            disturb(model, tokenizer)
            assert all(a != b for i, (a, b) in enumerate(zip(before, state(model, tokenizer), strict=True)) if i != 4)
            if raising:
                raise RuntimeError
    except RuntimeError:
        assert raising
    assert state(model, tokenizer) == before


def test_selective_checkpointing_comes_back_layer_by_layer():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    if not hasattr(model, "activation_checkpointing_enable"):
        pytest.skip("this transformers checkpoints all layers or none")
    model.activation_checkpointing_enable(every_n_layers=2)
    before = state(model, tokenizer)
    with untouched(model):
        disable_checkpointing(model)
        enable_checkpointing(model)  # as TRL does around generation: all layers, a new function
        assert state(model, tokenizer) != before
    assert state(model, tokenizer) == before


def test_a_wrapped_model_and_a_processor():
    class Processor:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model, tokenizer = training_model(), tiny_tokenizer(padding_side="left")
    before = state(model, tokenizer)
    with untouched(Wrapper(model), Processor(tokenizer)):
        disturb(model, tokenizer)
    assert state(model, tokenizer) == before


def test_gradients_written_in_place_and_hooks_left_behind_are_reported(caplog):
    model = training_model()
    with caplog.at_level(logging.WARNING), untouched(model):
        list(model.parameters())[2].grad.add_(1)
        handle = model.register_forward_hook(lambda *_: None)
    assert "wrote into the gradients of 1 parameters" in caplog.text
    assert "hooks on the model went from" in caplog.text
    handle.remove()
    caplog.clear()
    with caplog.at_level(logging.WARNING), untouched(model):
        pass
    assert not caplog.records


def test_seeded_repeats_itself_and_leaves_no_trace():
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = draws()
    with seeded(5):
        first = draws()
    random.random(), torch.rand(1)
    with seeded(5):
        second = draws()
    with seeded(6):
        third = draws()
    assert first == second
    assert all(a != b for a, b in zip(first, third, strict=True))
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    with pytest.raises(RuntimeError), seeded(2**63 - 1):
        raise RuntimeError
    assert draws() == before


class FakeDevice:
    """torch.cuda as far as the guard uses it, on two devices."""

    states = (1, 2)

    def get_rng_state_all(self):
        return list(self.states)

    def set_rng_state_all(self, states):
        self.states = tuple(states)

    def manual_seed_all(self, seed):
        self.states = (seed, seed)

    manual_seed = manual_seed_all


def test_every_device_in_use_is_seeded_and_restored(monkeypatch):
    device = FakeDevice()
    monkeypatch.setattr("passk_guard.utils.isolation._accelerator", lambda: device)
    with untouched(tiny_model()):
        with seeded(5):
            assert device.states == (5, 5)
        assert device.states == (1, 2)
        device.states = (3, 4)
    assert device.states == (1, 2)
