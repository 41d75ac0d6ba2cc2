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


class RoutedLM(PlainLM):
    """Each token goes to one of four experts, each a linear layer called on the tokens it got, as many as there are."""

    def __init__(self):
        super().__init__()
        self.block = Routed()

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids, attention_mask) + self.head(self.block(self.embed(input_ids), input_ids))


class Routed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(12, 12) for _ in range(4))

    def forward(self, x, ids):
        found = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            # The last one gets token 22, which a short batch lacks; the first one four tokens of a batch of four.
            chosen = (ids == 22) if number == 3 else (ids % 3 == number) & (ids != 22)
            if chosen.any():
                found[chosen] = expert(x[chosen])
        return found


def test_experts_that_are_called_on_the_tokens_they_got():
    torch.manual_seed(0)
    model, ids = (
        RoutedLM().double(),
        torch.tensor([[3, 1, 2, 4, 5], [1, 6, 22, 2, 2], [4, 4, 1, 9, 8], [12, 7, 2, 1, 1]]),
    )
    assert ((ids % 3 == 0).sum(), (ids == 22).sum()) == (4, 1)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": (ids > 0).long().cumsum(1).gt(1),
    }
    batch |= {"slots": torch.arange(4)}
    sketcher = ScoreSketcher(model, method="identity")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(sketcher.sketch(**batch, num_slots=4), oracle_sketch(model, batch, 4)) < 1e-9
        assert sketcher.coverage.share == 1.0
