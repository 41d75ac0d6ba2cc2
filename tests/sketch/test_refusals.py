"""Misuse is refused with what was found and what to pass instead. A failed refresh names the samples."""

import pytest
import torch

from passk_guard.sketch import ScoreSketcher
from passk_guard.utils.errors import FailedRefresh, GuardError
from tests.helpers.tiny import tiny_model
from tests.sketch.models import VOCAB, PlainLM
from tests.sketch.oracle import ragged_batch


@pytest.fixture(scope="module")
def sketcher():
    return ScoreSketcher(tiny_model("qwen2"), dim=64)


def refused(sketcher, match, num_slots=6, temperature=1.0, **changed):
    with pytest.raises(GuardError, match=match):
        sketcher.sketch(**(ragged_batch() | changed), num_slots=num_slots, temperature=temperature)


def test_a_model_without_trainable_parameters_is_refused():
    model = tiny_model("qwen2").requires_grad_(False)
    with pytest.raises(GuardError, match="trainable"):
        ScoreSketcher(model, dim=64)


@pytest.mark.parametrize("method", ["kronecker", "countsketch"])
def test_a_small_dim_is_refused(method):
    with pytest.raises(GuardError, match="found 15"):
        ScoreSketcher(tiny_model(), dim=15, method=method)


def test_a_dim_without_two_similar_factors_is_refused():
    with pytest.raises(GuardError, match="Pass 1024"):
        ScoreSketcher(tiny_model(), dim=1021)
    assert ScoreSketcher(tiny_model(), dim=1021, method="countsketch").dim == 1021


def test_an_unknown_method_is_refused():
    with pytest.raises(GuardError, match="'kron'"):
        ScoreSketcher(tiny_model(), method="kron")


def test_left_padded_and_packed_rows_are_refused(sketcher):
    mask = ragged_batch()["attention_mask"]
    refused(sketcher, "right-padded", attention_mask=mask.flip(1))
    holed = torch.ones_like(mask)
    holed[0, 1] = 0
    refused(sketcher, "right-padded", attention_mask=holed)
    refused(sketcher, "right-padded", attention_mask=torch.zeros_like(mask))


def test_shapes_that_do_not_fit_are_refused(sketcher):
    batch = ragged_batch()
    refused(sketcher, "packed|Packed", input_ids=batch["input_ids"].flatten())
    refused(sketcher, "`attention_mask`", attention_mask=batch["attention_mask"].T)
    refused(sketcher, "`completion_mask`", completion_mask=batch["completion_mask"][:, 1:])
    refused(sketcher, "`slots`", slots=batch["slots"][:3])


def test_completion_tokens_that_nothing_predicts_are_refused(sketcher):
    batch = ragged_batch()
    refused(sketcher, "position 0", completion_mask=batch["attention_mask"])
    refused(sketcher, "padding", completion_mask=torch.ones_like(batch["completion_mask"]))


def test_slots_out_of_range_are_refused(sketcher):
    refused(sketcher, r"-1\.\.4", num_slots=5)
    refused(sketcher, "found -2", slots=torch.tensor([0, 1, 2, 3, 4, -2]))
    refused(sketcher, "int64", slots=torch.arange(6.0))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_an_invalid_temperature_is_refused(sketcher, temperature):
    refused(sketcher, "temperature", temperature=temperature)


def test_prompts_and_verdicts_out_of_range_are_refused(sketcher):
    batch = ragged_batch()
    tokens = [batch[name] for name in ("input_ids", "attention_mask", "completion_mask")]
    verdicts = torch.tensor([1, 0, -1, 1, 0, 1])
    with pytest.raises(GuardError, match="prompt_index"):
        sketcher.prompt_scores(*tokens, torch.tensor([0, 1, 2, 0, 1, 2]), verdicts, 2)
    with pytest.raises(GuardError, match="correct"):
        sketcher.prompt_scores(*tokens, torch.zeros(6, dtype=torch.int64), 2 * verdicts, 2)
    with pytest.raises(GuardError, match="correct"):
        sketcher.prompt_scores(*tokens, torch.zeros(6, dtype=torch.int64), verdicts[:5], 2)


@pytest.mark.parametrize("place", [torch.empty(5), torch.empty(6, 1), torch.empty(6, dtype=torch.int64)])
def test_log_probs_of_another_shape_or_dtype_are_refused(sketcher, place):
    refused(sketcher, "`log_probs`", log_probs=place)


def test_a_model_without_logits_is_refused():
    batch = ragged_batch()
    with pytest.raises(GuardError, match="logits"):
        ScoreSketcher(tiny_model("qwen2").model, dim=64).sketch(**batch, num_slots=6)


def test_a_model_that_detaches_is_refused():
    class Detached(PlainLM):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids, attention_mask).detach()

    with pytest.raises(GuardError, match="no_grad"):
        ScoreSketcher(Detached(), dim=64).sketch(**ragged_batch(vocab=VOCAB), num_slots=6)


@pytest.mark.parametrize("method", ["kronecker", "countsketch"])
def test_a_sample_that_is_not_finite_fails_the_refresh_and_is_named(method):
    torch.manual_seed(0)
    model, batch = PlainLM(), ragged_batch(vocab=VOCAB - 1, slots=[5, 4, 3, 2, 1, 0])
    with torch.no_grad():
        model.embed.weight[VOCAB - 1] = float("nan")
        model.head.weight = torch.nn.Parameter(model.embed.weight.nan_to_num())
    batch["input_ids"][4, 0] = VOCAB - 1
    with pytest.raises(FailedRefresh, match=r"samples 4 of the batch"):
        ScoreSketcher(model, dim=64, method=method).sketch(**batch, num_slots=6)
