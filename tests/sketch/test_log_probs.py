"""The log-probabilities that a pass writes into `log_probs`."""

import pytest
import torch

from passk_guard.sketch import ScoreSketcher
from tests.helpers.tiny import tiny_model
from tests.sketch.oracle import log_prob, ragged_batch


def one_by_one(model, batch, temperature):
    samples = zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True)
    with torch.no_grad():
        values = [log_prob(model.eval(), i[: a.sum()], c[: a.sum()], temperature) for i, a, c in samples]
    return torch.stack(values)


@pytest.mark.parametrize("method", ["kronecker", "countsketch", "identity"])
def test_they_are_in_the_order_of_the_samples_ignored_ones_included(method):
    model, batch = tiny_model("qwen2"), ragged_batch(slots=[2, 0, -1, 2, 0, 3])
    found = torch.full((6,), float("nan"))
    ScoreSketcher(model, dim=64, method=method).sketch(**batch, num_slots=4, temperature=0.7, log_probs=found)
    torch.testing.assert_close(found, one_by_one(model, batch, 0.7), rtol=1e-5, atol=1e-5)


def test_an_empty_completion_has_log_probability_zero():
    model, batch = tiny_model("gpt2"), ragged_batch()
    batch["completion_mask"][2] = 0
    found = torch.full((6,), float("nan"))
    ScoreSketcher(model, dim=64).sketch(**batch, num_slots=6, log_probs=found)
    assert found[2] == 0
    assert found.isfinite().all()


def test_asking_for_them_does_not_change_the_sketch():
    sketcher, batch = ScoreSketcher(tiny_model("qwen2"), dim=64), ragged_batch()
    without = sketcher.sketch(**batch, num_slots=6)
    assert torch.equal(without, sketcher.sketch(**batch, num_slots=6, log_probs=torch.empty(6)))
