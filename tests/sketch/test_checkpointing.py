"""Gradient checkpointing runs in train mode only, where dropout must be off all the same."""

import weakref

import pytest
import torch
from transformers import BartConfig, BartForCausalLM

from passk_guard.sketch import ScoreSketcher
from passk_guard.sketch.layers import LinearContribution
from tests.helpers.tiny import tiny_model
from tests.sketch.models import VOCAB, DroppingLM
from tests.sketch.oracle import oracle_sketch, ragged_batch, relative_error

DROPOUT = {
    "qwen2": {"attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
}


def checkpointed(kind, use_reentrant):
    model = tiny_model(kind, **DROPOUT[kind]).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_equals_the_gradients_in_eval_mode(kind, use_reentrant):
    model, batch = checkpointed(kind, use_reentrant), ragged_batch()
    found = ScoreSketcher(model, method="identity").sketch(**batch, num_slots=6)
    assert relative_error(found, oracle_sketch(model, batch, 6)) < 1e-5


@pytest.mark.parametrize("method", ["kronecker", "countsketch"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_sketches_do_not_depend_on_checkpointing(use_reentrant, method):
    model, batch = checkpointed("qwen2", use_reentrant), ragged_batch()
    sketcher = ScoreSketcher(model, dim=256, method=method)
    with_it = sketcher.sketch(**batch, num_slots=6)
    without = sketcher.sketch(**batch, num_slots=6) if model.eval() else None
    torch.testing.assert_close(with_it, without, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_are_recomputed_in_the_backward(use_reentrant):
    """Otherwise the memory that checkpointing saves would come back, unnoticed."""
    model, calls = checkpointed("qwen2", use_reentrant), []
    sketcher = ScoreSketcher(model, method="identity")
    sketcher.settle(model.device)
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    sketcher.sketch(**ragged_batch(), num_slots=6)
    assert len(calls) == 2 + 2  # two for the check of the padding, once


@pytest.mark.parametrize("method", ["kronecker", "countsketch"])
def test_inputs_are_not_held_from_forward_to_backward(method, monkeypatch):
    """What the hooks keep is dropped with the other activations of a checkpointed layer."""
    references, alive, keep = [], [], LinearContribution.keep

    def recorded(self, u):
        kept = keep(self, u)
        references.extend(weakref.ref(tensor) for tensor in kept)
        return kept

    monkeypatch.setattr(LinearContribution, "keep", recorded)
    model = checkpointed("qwen2", False)
    sketcher = ScoreSketcher(model, dim=256, method=method)
    sketcher.settle(model.device)
    references.clear()
    model.lm_head.register_forward_hook(lambda *_: alive.extend(r() is not None for r in references))
    sketcher.sketch(**ragged_batch(), num_slots=6)
    assert len(alive) == 14  # two layers of seven
    assert not any(alive)


def test_functional_dropout_of_a_checkpointing_layer_is_off():
    """Layers of the BART family drop out by themselves, with a rate that is a number on the layer."""
    config = BartConfig(
        vocab_size=76,
        d_model=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        dropout=0.5,
        init_std=0.3,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = BartForCausalLM(config).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = ragged_batch()
    sketcher = ScoreSketcher(model, method="identity")
    once, twice = (sketcher.sketch(**batch, num_slots=6) for _ in range(2))
    assert torch.equal(once, twice)
    assert relative_error(once, oracle_sketch(model, batch, 6)) < 1e-5


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_dropout_inside_the_checkpointed_function_is_off_whatever_its_rate_is_called(use_reentrant):
    torch.manual_seed(0)
    model, batch = DroppingLM(use_reentrant).double().train(), ragged_batch(vocab=VOCAB)
    found = ScoreSketcher(model, method="identity").sketch(**batch, num_slots=6)
    assert relative_error(found, oracle_sketch(model, batch, 6)) < 1e-9
