"""method="identity" against each completion's gradient taken alone by autograd."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GemmaConfig, Qwen3Config

from passk_guard.sketch import ScoreSketcher
from tests.helpers.tiny import tiny_model
from tests.sketch.models import VOCAB, HandCheckpointedLM, PlainLM
from tests.sketch.oracle import oracle_sketch, ragged_batch, relative_error


def identity(model, batch, num_slots=6, temperature=1.0):
    return ScoreSketcher(model, method="identity").sketch(**batch, num_slots=num_slots, temperature=temperature)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_equals_autograd_per_completion_in_fp32(kind, tied):
    model, batch = tiny_model(kind, tie_word_embeddings=tied), ragged_batch()
    found = identity(model, batch, temperature=0.7)
    assert found.dtype == torch.float32
    assert relative_error(found, oracle_sketch(model, batch, 6, 0.7)) < 1e-5


def in_float64_throughout(model):
    """Qwen2 and Llama compute their norms and eager softmax in fp32 even in a float64 model; undo that."""
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = partial(
                lambda norm, x: (
                    x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight
                ),
                module,
            )
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "llama"])
def test_equals_autograd_in_float64(kind, tied):
    model = in_float64_throughout(tiny_model(kind, tie_word_embeddings=tied).double())
    batch = ragged_batch(seed=1)
    found = identity(model, batch)
    assert found.dtype == torch.float64
    assert relative_error(found, oracle_sketch(model, batch, 6)) < 1e-9


@pytest.mark.parametrize("norm", [torch.nn.RMSNorm, torch.nn.LayerNorm])
@pytest.mark.parametrize("model_class", [PlainLM, HandCheckpointedLM])
def test_equals_autograd_in_float64_for_a_model_outside_hugging_face(model_class, norm):
    """Flattened tokens, positions without a batch dimension, in-place addition, a padding row, reused modules."""
    torch.manual_seed(0)
    model, batch = model_class(norm).double(), ragged_batch(vocab=VOCAB)
    assert relative_error(identity(model, batch), oracle_sketch(model, batch, 6)) < 1e-9


@pytest.mark.parametrize(
    ("config_class", "extra"),
    [(GemmaConfig, {}), (Gemma3TextConfig, {"query_pre_attn_scalar": 8}), (Qwen3Config, {})],
)
def test_norm_variants_and_scaled_embeddings(config_class, extra):
    """Gemma's 1 + w and its scaled embedding; the norms on head dimensions of Gemma3 and Qwen3."""
    config = config_class(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        **extra,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
    batch = ragged_batch(vocab=40)
    sketcher = ScoreSketcher(model, method="identity")
    assert relative_error(sketcher.sketch(**batch, num_slots=6), oracle_sketch(model, batch, 6)) < 1e-5
    assert sketcher.coverage.share == 1.0


def test_slots_are_sums_and_minus_one_counts_nowhere():
    model = tiny_model("qwen2")
    alone = identity(model, ragged_batch())
    grouped = identity(model, ragged_batch(slots=[2, 0, -1, 2, 0, 3]), num_slots=5)
    expected = torch.stack([alone[1] + alone[4], 0 * alone[0], alone[0] + alone[3], alone[5], 0 * alone[0]])
    torch.testing.assert_close(grouped, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_slots_do_not_depend_on_the_order_of_samples():
    model, batch = tiny_model("qwen2"), ragged_batch(slots=[2, 0, -1, 2, 0, 3])
    flipped = {name: tensor.flip(0) for name, tensor in batch.items()}
    torch.testing.assert_close(identity(model, flipped), identity(model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["identity", "kronecker", "countsketch"])
def test_prompt_scores_are_slots_of_correct_and_wrong_samples(method):
    model, batch = tiny_model("llama"), ragged_batch(slots=[0, 2, -1, 1, 3, -1])
    sketcher = ScoreSketcher(model, dim=64, method=method)
    rows = sketcher.sketch(**batch, num_slots=4)
    tokens = [batch[name] for name in ("input_ids", "attention_mask", "completion_mask")]
    prompt_index, correct = torch.tensor([0, 0, 1, 1, 1, -1]), torch.tensor([1, 0, -1, 1, 0, 1])
    plus, minus = sketcher.prompt_scores(*tokens, prompt_index, correct, 2)
    assert torch.equal(torch.cat([plus, minus]), rows)


def test_content_and_amount_of_padding_do_not_matter():
    model, batch = tiny_model("gpt2"), ragged_batch()
    padding = torch.zeros(6, 3, dtype=torch.int64)
    wider = {n: torch.cat([t, padding], 1) if t.dim() == 2 else t for n, t in batch.items()}
    wider["input_ids"] = wider["input_ids"].masked_fill(wider["attention_mask"] == 0, 7)
    torch.testing.assert_close(identity(model, wider), identity(model, batch), rtol=1e-4, atol=1e-5)


def test_an_empty_completion_contributes_nothing_and_a_filler_batch_gives_zeros():
    model, batch = tiny_model("qwen2"), ragged_batch()
    batch["completion_mask"][2] = 0
    found = identity(model, batch)
    assert found[2].abs().max() == 0
    assert found[3].abs().max() > 0
    batch["slots"].fill_(-1)
    assert identity(model, batch).abs().max() == 0


def test_only_trainable_parameters_are_sketched():
    model, batch = tiny_model("qwen2"), ragged_batch()
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    expected = oracle_sketch(model, batch, 6)
    assert relative_error(identity(model, batch), expected) < 1e-5


def test_follows_a_change_of_the_trainable_parameters():
    model, batch = tiny_model("qwen2"), ragged_batch()
    sketcher = ScoreSketcher(model, method="identity")
    sketcher.sketch(**batch, num_slots=6)
    model.model.embed_tokens.weight.requires_grad_(False)
    expected = oracle_sketch(model, batch, 6)
    assert relative_error(sketcher.sketch(**batch, num_slots=6), expected) < 1e-5
    assert sketcher.dim == expected.shape[1]


@pytest.mark.parametrize("method", ["identity", "kronecker", "countsketch"])
def test_bf16_stays_close_to_fp32(method):
    model, batch = tiny_model("qwen2", initializer_range=0.1), ragged_batch()
    model = model.bfloat16()
    low = ScoreSketcher(model, dim=1024, method=method).sketch(**batch, num_slots=6)
    high = ScoreSketcher(model.float(), dim=1024, method=method).sketch(**batch, num_slots=6)
    assert low.dtype == torch.float32
    assert relative_error(low, high) < 0.05


@pytest.mark.parametrize("method", ["identity", "kronecker", "countsketch"])
def test_autocast_around_the_model_stays_close_to_fp32(method):
    model, batch = tiny_model("qwen2", initializer_range=0.1), ragged_batch()
    sketcher = ScoreSketcher(model, dim=1024, method=method)
    high = sketcher.sketch(**batch, num_slots=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = sketcher.sketch(**batch, num_slots=6)
    assert 0 < relative_error(low, high) < 0.05
