"""PEFT adapters: theta is the adapter, and nothing else requires grad."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from passk_guard.sketch import ScoreSketcher
from tests.helpers.live_bytes import most_alive
from tests.helpers.tiny import tiny_model
from tests.sketch.oracle import oracle_sketch, ragged_batch, relative_error


def lora_model(kind="qwen2", **extra):
    settings = {"r": 4, "lora_dropout": 0.3, "target_modules": ["q_proj", "down_proj"]} | extra
    if kind == "gpt2":
        settings |= {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    model = get_peft_model(tiny_model(kind), LoraConfig(**settings)).train()
    torch.manual_seed(1)
    with torch.no_grad():  # B starts at zero, which would leave A without a gradient
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_equals_autograd_over_the_adapters(kind):
    model, batch = lora_model(kind), ragged_batch()
    sketcher = ScoreSketcher(model, method="identity")
    assert relative_error(sketcher.sketch(**batch, num_slots=6), oracle_sketch(model, batch, 6)) < 1e-5
    assert sketcher.coverage.share == 1.0
    assert sketcher.dim == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_equals_autograd_under_checkpointing(use_reentrant):
    """Reentrant checkpointing finds no gradient at all unless the embedding output requires one."""
    model, batch = lora_model(), ragged_batch()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = ScoreSketcher(model, method="identity").sketch(**batch, num_slots=6)
    assert relative_error(found, oracle_sketch(model, batch, 6)) < 1e-5


def test_works_with_the_input_hook_that_trainers_install():
    model, batch = lora_model(), ragged_batch()
    model.enable_input_require_grads()
    found = ScoreSketcher(model, method="identity").sketch(**batch, num_slots=6)
    assert relative_error(found, oracle_sketch(model, batch, 6)) < 1e-5


def test_modules_to_save_and_trained_heads():
    model, batch = lora_model(modules_to_save=["lm_head"]), ragged_batch()
    found = ScoreSketcher(model, method="identity").sketch(**batch, num_slots=6)
    assert relative_error(found, oracle_sketch(model, batch, 6)) < 1e-5


def test_thin_factors_are_projected_with_little_error():
    """A LoRA factor fits on its thin side, and here on its long side too: only collisions are left."""
    model, batch = lora_model(), ragged_batch()
    exact = oracle_sketch(model, batch, 6)
    found = torch.stack([ScoreSketcher(model, dim=4096, seed=s).sketch(**batch, num_slots=6) for s in range(8)])
    errors = found @ found.mT - exact @ exact.T
    scale = exact.norm(dim=1)[:, None] * exact.norm(dim=1)
    assert float((errors / scale).square().mean().sqrt()) < 2 / 4096**0.5


def test_a_pass_takes_about_the_memory_of_one_over_all_weights():
    """The projection of a thin factor is wider than the layer's input, and is not what is kept of it."""
    wide = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    ids, ones = torch.randint(3, 70, (60, 40), generator=torch.Generator().manual_seed(0)), torch.ones(60, 40).long()
    batch = {"input_ids": ids, "attention_mask": ones, "completion_mask": ones * (torch.arange(40) >= 20)}
    batch["slots"] = torch.zeros(60, dtype=torch.int64)

    def peak(adapted):
        model = tiny_model("llama", **wide)
        model.set_attn_implementation("sdpa")
        if adapted:
            model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")).train()
        sketcher = ScoreSketcher(model, dim=4096)
        sketcher.sketch(**batch, num_slots=1)  # projections are sampled once
        return most_alive(lambda: sketcher.sketch(**batch, num_slots=1))

    assert peak(adapted=True) < 1.2 * peak(adapted=False)
