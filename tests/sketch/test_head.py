"""The closed form of the head against the plain pass and against autograd, and models to which it does not apply."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from passk_guard.sketch import ScoreSketcher
from tests.helpers.tiny import tiny_model
from tests.sketch.models import VOCAB, NamedHeadLM, TwiceHeadLM
from tests.sketch.oracle import oracle_sketch, ragged_batch, relative_error
from tests.sketch.test_lora import lora_model

METHODS = ["identity", "kronecker", "countsketch"]


def sketched(model, batch, method="identity", closed=True, applies=True, **options):
    """The sketch, by the closed form or without it; whether the closed form applied has to be as expected."""
    sketcher = ScoreSketcher(model, dim=256, method=method)
    sketcher._closed = sketcher._closed and closed
    rows = sketcher.sketch(**batch, num_slots=6, **options)
    assert sketcher._closed == (closed and applies)
    return rows


class LargestTensor(TorchDispatchMode):
    """Notes the largest storage, in bytes, that any operation inside returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


def small_chunks(monkeypatch, tokens):
    monkeypatch.setattr("passk_guard.sketch.head._CHUNK_SCALARS", {"cpu": 1})
    monkeypatch.setattr("passk_guard.sketch.head._FEWEST_TOKENS", tokens)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_equals_autograd_in_several_chunks(kind, tied, monkeypatch):
    model, batch = tiny_model(kind, tie_word_embeddings=tied), ragged_batch(slots=[3, 0, -1, 3, 5, 0])
    expected = oracle_sketch(model, batch, 6, 0.7)
    small_chunks(monkeypatch, 4)
    assert relative_error(sketched(model, batch, temperature=0.7), expected) < 1e-5


@pytest.mark.parametrize("tokens", [1, 4, 1000])
def test_equals_autograd_in_float64_however_the_tokens_are_cut(tokens, monkeypatch):
    torch.manual_seed(0)
    model, batch = NamedHeadLM().double(), ragged_batch(vocab=VOCAB, slots=[3, 0, -1, 3, 5, 0])
    expected = oracle_sketch(model, batch, 6, 1.3)
    small_chunks(monkeypatch, tokens)
    assert relative_error(sketched(model, batch, temperature=1.3), expected) < 1e-12


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_gives_the_same_sketch_and_log_probabilities_as_the_plain_pass(method, kind):
    model, batch = tiny_model(kind, vocab_size=200), ragged_batch(vocab=200, slots=[1, 0, -1, 1, 4, 0])
    closed, plain = torch.empty(6), torch.empty(6)
    rows = sketched(model, batch, method, temperature=0.8, log_probs=closed)
    expected = sketched(model, batch, method, closed=False, temperature=0.8, log_probs=plain)
    assert relative_error(rows, expected) < 1e-5
    torch.testing.assert_close(closed, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trained", ["head", "body"])
def test_a_head_trained_alone_and_a_frozen_head(trained):
    model, batch = tiny_model("llama", tie_word_embeddings=False), ragged_batch()
    for name, p in model.named_parameters():
        p.requires_grad_(("lm_head" in name) == (trained == "head"))
    assert relative_error(sketched(model, batch), oracle_sketch(model, batch, 6)) < 1e-5


def test_an_adapter_on_the_head_is_sketched_like_any_other_layer():
    model, batch = lora_model(target_modules=["q_proj", "lm_head"]), ragged_batch()
    assert relative_error(sketched(model, batch, applies=False), oracle_sketch(model, batch, 6)) < 1e-5


def test_adapters_elsewhere_leave_the_head_in_closed_form():
    model, batch = lora_model(), ragged_batch()
    assert relative_error(sketched(model, batch), oracle_sketch(model, batch, 6)) < 1e-5


@pytest.mark.parametrize(
    "finish",
    [
        lambda logits: 2 * torch.tanh(logits / 2),
        lambda logits: logits.float().double() + 0,
        lambda logits: logits.index_fill(-1, torch.tensor([3]), -1.0),
    ],
)
def test_a_model_that_goes_on_with_its_logits_is_sketched_plainly(finish):
    torch.manual_seed(0)
    model, batch = NamedHeadLM(finish).double(), ragged_batch(vocab=VOCAB)
    assert relative_error(sketched(model, batch, applies=False), oracle_sketch(model, batch, 6)) < 1e-6


@pytest.mark.parametrize(
    "view",
    [
        lambda logits: logits[..., :20],
        lambda logits: logits.unflatten(-1, (6, 4)).transpose(-1, -2).flatten(-2),
        lambda logits: logits[..., :1].expand_as(logits),
    ],
    ids=["slice", "permutation", "one column"],
)
def test_a_model_that_returns_a_view_of_its_logits_is_sketched_plainly(view):
    torch.manual_seed(0)
    model, batch = NamedHeadLM(view, vocab=24).double(), ragged_batch(vocab=20)
    found, expected = sketched(model, batch, applies=False), oracle_sketch(model, batch, 6)
    assert float((found - expected).norm()) <= 1e-9 * float(expected.norm()) + 1e-12


def test_a_hook_that_passes_the_logits_on_costs_nothing():
    """As the wrappers of sharded engines do: a view in the middle of the graph."""
    torch.manual_seed(0)
    model, batch = NamedHeadLM().double(), ragged_batch(vocab=VOCAB)
    model.head.register_forward_hook(lambda module, args, output: output.view_as(output))
    assert relative_error(sketched(model, batch), oracle_sketch(model, batch, 6)) < 1e-9


def test_a_model_that_writes_into_its_logits_is_sketched_plainly():
    torch.manual_seed(0)
    model, batch = NamedHeadLM(lambda logits: logits.mul_(0.5)).double(), ragged_batch(vocab=VOCAB)
    with pytest.warns(UserWarning, match=r"embed\.weight"):  # of the plain pass
        found = sketched(model, batch, applies=False)
    with pytest.warns(UserWarning, match=r"embed\.weight"):
        assert torch.equal(found, sketched(model, batch, closed=False))


def test_a_head_that_is_called_twice_is_sketched_plainly():
    torch.manual_seed(0)
    model, batch = TwiceHeadLM().double(), ragged_batch(vocab=VOCAB)
    assert relative_error(sketched(model, batch, applies=False), oracle_sketch(model, batch, 6)) < 1e-9


def test_what_did_not_apply_is_not_tried_again():
    torch.manual_seed(0)
    calls, batch = [], ragged_batch(vocab=VOCAB)
    model = NamedHeadLM(lambda logits: calls.append(1) or logits / 2)
    sketcher = ScoreSketcher(model, dim=64)
    for _ in range(3):
        sketcher.sketch(**batch, num_slots=6)
    assert len(calls) == 2 + 5  # two for the check of the padding, two settle it


def test_upcasting_the_stand_in_costs_nothing():
    """Mixed precision wraps the model's forward in a conversion of its outputs to fp32."""
    torch.manual_seed(0)
    model, batch = NamedHeadLM(lambda logits: logits.float()).bfloat16(), ragged_batch(vocab=VOCAB)
    low = sketched(model, batch)
    assert relative_error(low, sketched(model, batch, closed=False)) < 0.03


@pytest.mark.parametrize("method", ["kronecker", "countsketch"])
def test_no_tensor_is_as_large_as_the_logits(method, monkeypatch):
    model, vocab = tiny_model("qwen2", vocab_size=2000), 2000
    batch = {name: tensor.repeat(8, *[1] * (tensor.dim() - 1)) for name, tensor in ragged_batch(vocab=vocab).items()}
    batch["slots"] = batch["slots"] % 2
    logits = 4 * batch["input_ids"].numel() * vocab
    small_chunks(monkeypatch, 16)
    peaks = []
    for closed in (True, False):
        with LargestTensor() as seen:
            sketched(model, batch, method, closed)
        peaks.append(seen.bytes)
    assert peaks[0] < logits / 4
    assert peaks[1] >= logits


def test_the_weight_is_read_only_while_the_head_is_called():
    """As under ZeRO-3, where it is empty at all other times."""
    model, batch = tiny_model("llama", tie_word_embeddings=False), ragged_batch()
    expected = sketched(model, batch, "kronecker")
    head = model.lm_head
    whole = head.weight.data
    head.weight.ds_shape = whole.shape
    head.weight.data = torch.empty(0)

    def fill(*_):
        head.weight.data = whole

    def drop(*_):
        head.weight.data = torch.empty(0)

    head.register_forward_pre_hook(fill)
    head.register_forward_hook(drop)
    assert torch.equal(sketched(model, batch, "kronecker"), expected)
