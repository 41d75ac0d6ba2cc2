"""Parameters that are not sketched are reported, at construction and after a pass that misses more."""

import warnings

import pytest
import torch

from passk_guard.sketch import ScoreSketcher
from tests.helpers.tiny import tiny_model
from tests.sketch.models import VOCAB, FusedHeadLM, GatedRMSNorm, PlainLM, ScaledLM
from tests.sketch.oracle import oracle_sketch, ragged_batch, relative_error


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_ordinary_models_are_covered_in_full(kind):
    model = tiny_model(kind)
    coverage = ScoreSketcher(model, dim=64).coverage
    count = sum(p.numel() for p in model.parameters())  # a tied weight counts once
    assert (coverage.covered, coverage.total, coverage.share, coverage.uncovered) == (count, count, 1.0, ())


def test_a_bare_parameter_is_reported_and_warned_about_once():
    torch.manual_seed(0)
    model = ScaledLM()
    with pytest.warns(UserWarning, match=r"gain \(4,096\)") as caught:
        sketcher = ScoreSketcher(model, dim=64)
    assert len(caught) == 1
    assert sketcher.coverage.uncovered == ("gain",)
    assert sketcher.coverage.total - sketcher.coverage.covered == 4096
    assert sketcher.coverage.share < 0.95
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sketcher.sketch(**ragged_batch(vocab=VOCAB), num_slots=6)


def test_the_rest_stays_exact_beside_a_bare_parameter():
    torch.manual_seed(0)
    model, batch = ScaledLM().double(), ragged_batch(vocab=VOCAB)
    with pytest.warns(UserWarning, match="gain"):
        found = ScoreSketcher(model, method="identity").sketch(**batch, num_slots=6)
    expected = oracle_sketch(model, batch, 6)
    expected[:, : model.gain.numel()] = 0  # a module's own parameters come first
    assert relative_error(found, expected) < 1e-9


def test_a_head_that_is_bypassed_is_noticed_after_a_pass():
    torch.manual_seed(0)
    sketcher = ScoreSketcher(FusedHeadLM(), dim=64)
    assert sketcher.coverage.share == 1.0
    batch = ragged_batch(vocab=VOCAB)
    with pytest.warns(UserWarning, match="bypassed"):
        sketcher.sketch(**batch, num_slots=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sketcher.sketch(**batch, num_slots=6)
    assert set(sketcher.coverage.uncovered) == {"embed.weight", "head.bias"}  # the head is tied


def test_a_norm_with_another_formula_runs_again():
    torch.manual_seed(0)
    model, batch = PlainLM(GatedRMSNorm).double(), ragged_batch(vocab=VOCAB)
    sketcher = ScoreSketcher(model, method="identity")
    found = sketcher.sketch(**batch, num_slots=6)
    assert sketcher.coverage.share == 1.0
    assert relative_error(found, oracle_sketch(model, batch, 6)) < 1e-9


def test_a_layer_called_on_something_else_than_the_batch_is_noticed():
    class Transposed(PlainLM):
        def forward(self, input_ids, attention_mask):
            x = self.norm(self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1])))
            return self.head(self.down(self.up(x.transpose(0, 1)).transpose(0, 1)))

    torch.manual_seed(0)
    sketcher = ScoreSketcher(Transposed(), dim=64)
    with pytest.warns(UserWarning, match=r"up\.weight"):
        sketcher.sketch(**ragged_batch(vocab=VOCAB), num_slots=6)
    assert set(sketcher.coverage.uncovered) == {"up.weight", "up.bias"}
