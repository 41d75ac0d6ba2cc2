"""What is sketched of a layer is its gradient, or is named: hooks, replaced forwards, other norms, other layouts."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CpmAntConfig
from transformers.pytorch_utils import Conv1D

from passk_guard.sketch import ScoreSketcher, filler_batch
from passk_guard.utils.errors import GuardError
from tests.sketch.models import VOCAB, GatedRMSNorm, PlainLM, SequenceFirstLM, UnmaskedLM
from tests.sketch.oracle import log_prob, oracle_sketch, ragged_batch


def tiny_cpmant(**options):
    config = CpmAntConfig(
        vocab_size=40,
        hidden_size=16,
        num_attention_heads=2,
        dim_head=8,
        dim_ff=24,
        num_hidden_layers=1,
        position_bias_num_buckets=16,
        prompt_types=4,
        prompt_length=3,
        segment_types=4,
        init_std=0.3,
        **options,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


CHANGES = {
    "scaled": lambda output: 1.5 * output,
    "bent": torch.sin,
    "in place": lambda output: output.mul_(0.5),
    "some tokens": lambda output: torch.where(output.detach().sum(-1, keepdim=True) > 0, 2 * output, output),
}
pytestmark = pytest.mark.filterwarnings("ignore:These trainable parameters:UserWarning")


def wrong_in_silence(model, batch, error=1e-9):
    """Names of parameters that count as covered and whose gradient is not that of autograd; and of those left out."""
    sketcher = ScoreSketcher(model, method="identity")
    found, expected = sketcher.sketch(**batch, num_slots=6), oracle_sketch(model, batch, 6)
    left_out, wrong, start = sketcher.coverage.uncovered, [], 0
    for name, p in model.named_parameters():
        part = slice(start, start + p.numel())
        start += p.numel()
        difference = (found[:, part] - expected[:, part]).norm() / expected[:, part].norm().clamp_min(1e-30)
        if name not in left_out and difference > error:
            wrong.append((name, float(difference)))
    return wrong, set(left_out)


def model_of(norm=nn.RMSNorm, kind=PlainLM):
    torch.manual_seed(0)
    model = kind(norm)
    model.down = Conv1D(12, 20)
    nn.init.normal_(model.down.weight, std=0.5)
    return model.double()


LAYERS = ["embed", "positions", "norm", "up", "down"]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_a_hook_that_changes_the_output_of_a_layer(norm, layer):
    """The gradient is exact where the output of the layer itself can be tapped, before the hook."""
    for name, change in CHANGES.items():
        model, batch = model_of(norm), ragged_batch(vocab=VOCAB)
        model.get_submodule(layer).register_forward_hook(lambda module, args, output, change=change: change(output))
        wrong, left_out = wrong_in_silence(model, batch)
        assert not wrong, name
        if layer in ("norm", "up") or (layer == "down" and name != "in place"):
            assert not left_out, name


@pytest.mark.parametrize("layer", LAYERS)
def test_a_replaced_forward_that_changes_the_output_of_a_layer(layer):
    """It runs again in the backward, so that the gradient is that of what it does."""
    for name, change in CHANGES.items():
        model, batch = model_of(nn.LayerNorm), ragged_batch(vocab=VOCAB)
        module = model.get_submodule(layer)
        module.forward = lambda x, original=module.forward, change=change: change(original(x))
        wrong, _ = wrong_in_silence(model, batch)
        assert not wrong, name


def released(model):
    """Weights are there only in the forward of their module, as under ZeRO-3."""
    for module in model.modules():
        for p in module.parameters(recurse=False):
            p.ds_shape = p.shape
    whole = {id(p): p.data for p in model.parameters()}

    def fill(module, *_):
        for p in module.parameters(recurse=False):
            p.data = whole[id(p)]

    def drop(module, *_):
        for p in module.parameters(recurse=False):
            p.data = p.data.new_empty(0)

    for module in (m for m in model.modules() if list(m.parameters(recurse=False))):
        drop(module)
        module.register_forward_pre_hook(fill)
        module.register_forward_hook(drop)
        if not isinstance(module, nn.Embedding):
            module.register_full_backward_pre_hook(fill)
            module.register_full_backward_hook(drop)
    return model


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm, GatedRMSNorm])
def test_weights_that_are_released_after_each_forward(norm, replaced):
    model, batch = model_of(norm), ragged_batch(vocab=VOCAB)
    if replaced:
        for layer in LAYERS:
            module = model.get_submodule(layer)
            module.forward = (lambda original: lambda x: 1.5 * original(x))(module.forward)
    expected = oracle_sketch(model, batch, 6)
    names, sizes = zip(*[(name, p.numel()) for name, p in model.named_parameters()], strict=True)
    sketcher = ScoreSketcher(released(model), method="identity")
    found = sketcher.sketch(**batch, num_slots=6)
    left_out = set(sketcher.coverage.uncovered)
    for name, of, to in zip(names, expected.split(sizes, 1), found.split(sizes, 1), strict=True):
        assert name in left_out or float((of - to).norm()) <= 1e-9 * float(of.norm()), name
    changed = set(LAYERS) if replaced else {"norm"} if norm is GatedRMSNorm else set()
    assert {name.split(".")[0] for name in left_out} == changed


@pytest.mark.parametrize("samples", [9, 10])
def test_a_layer_on_sequence_first_input_is_not_sketched_wrongly(samples):
    """With as many samples as tokens the two layouts have one shape."""
    torch.manual_seed(0)
    slots = [0, 1, 2, 3, -1, 5, 4, 0, 2, 2][:samples]
    model, batch = SequenceFirstLM().double(), ragged_batch(vocab=VOCAB, samples=samples, slots=slots)
    more = 10 - batch["input_ids"].shape[1]
    batch = {name: nn.functional.pad(x, (0, more)) if x.dim() == 2 else x for name, x in batch.items()}
    wrong, left_out = wrong_in_silence(model, batch)
    assert not wrong
    assert left_out == {"up.weight", "up.bias"}


@pytest.mark.parametrize("samples", [9, 10])
def test_log_probabilities_come_in_the_order_of_the_samples(samples):
    torch.manual_seed(0)
    batch = ragged_batch(vocab=VOCAB, samples=samples, slots=[3, 1, 2, 0, -1, 5, 4, 0, 2, 2][:samples])
    model, found, more = PlainLM().double(), torch.empty(samples).double(), 10 - batch["input_ids"].shape[1]
    batch = {name: nn.functional.pad(x, (0, more)) if x.dim() == 2 else x for name, x in batch.items()}
    ScoreSketcher(model, dim=64).sketch(**batch, num_slots=6, log_probs=found)
    for i, length in enumerate(batch["attention_mask"].sum(1)):
        expected = log_prob(model, batch["input_ids"][i, :length], batch["completion_mask"][i, :length], 1.0)
        torch.testing.assert_close(found[i], expected.detach())


def test_a_model_that_reads_padding_is_refused_where_there_is_some():
    torch.manual_seed(0)
    sketcher, batch = ScoreSketcher(UnmaskedLM(), dim=64), ragged_batch(vocab=VOCAB)
    for _ in range(2):
        with pytest.raises(GuardError, match="padding"):
            sketcher.sketch(**batch, num_slots=6)
    filler = filler_batch(pad_token_id=0, device="cpu")  # keeps a rank that was refused in step with the others
    tokens = filler.input_ids, filler.attention_mask, filler.completion_mask
    sketcher.sketch(*tokens, torch.tensor([0]), 1)


@pytest.mark.parametrize("named", [None, 0])
def test_what_pads_later_batches_is_tried_in_one_without_padding(named):
    """CPMAnt counts the tokens that are not 0, and expects the padding on the left."""
    model = tiny_cpmant(pad_token_id=named)
    sketcher, batch = ScoreSketcher(model, method="identity"), ragged_batch(vocab=40)
    batch["input_ids"] = torch.where((batch["attention_mask"] == 1) & (batch["input_ids"] == 0), 1, batch["input_ids"])
    if named is not None:
        shortest = int(batch["attention_mask"].sum(1).min())
        even = {name: x[:, :shortest] if x.dim() == 2 else x for name, x in batch.items()}
        sketcher.sketch(**even, num_slots=6)
    with pytest.raises(GuardError, match="padding"):
        sketcher.sketch(**batch, num_slots=6)
