"""The blocked sums and their Gram matrix, against plain ones."""

import pytest
import torch

from passk_guard import score_sums
from passk_guard.ranks import Ranks
from passk_guard.score_sums import add_scores_, gram_matrix, sum_over_ranks_
from passk_guard.sketch import ScoreSketcher, filler_batch, token_batches
from tests.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("block", [1, 7, 100, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_blocked_gram_matrix_is_the_plain_one(block, dtype, monkeypatch):
    monkeypatch.setattr(score_sums, "_BLOCK", block)
    sums = (1e3 * torch.randn(9, 33, generator=torch.Generator().manual_seed(0))).to(dtype)
    rows = torch.tensor([8, 0, 3, 3, 5])
    wide = sums.double()[rows]
    found = gram_matrix(sums, rows)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wide @ wide.T, rtol=1e-13, atol=1e-6)
    assert gram_matrix(sums, rows[:0]).shape == (0, 0)


def batches(slots, max_tokens=40):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 70, (len(slots), 7), generator=generator).tolist()
    prompts, completions = [row[:3] for row in ids], [row[3 : 4 + i % 4] for i, row in enumerate(ids)]
    return list(token_batches(prompts, completions, slots, max_tokens=max_tokens, pad_token_id=0, device="cpu"))


@pytest.mark.parametrize("double", [False, True])
def test_growing_sums_are_those_of_whole_sketches(double):
    model = tiny_model().double() if double else tiny_model()
    sketcher = ScoreSketcher(model, dim=256)
    slots = [0, 5, 5, 9, 2, 0, 7, 9, 9, 1]
    grown = torch.zeros(12, 256)
    whole = torch.zeros(12, 256, dtype=torch.float64 if double else torch.float32)
    made = batches(slots)
    made[0].slots[1] = -1  # among samples that count
    assert len(made) > 1
    for batch in [*made, filler_batch(pad_token_id=0, device="cpu")]:
        arguments = (batch.input_ids, batch.attention_mask, batch.completion_mask, batch.slots)
        whole += sketcher.sketch(*arguments, 12, temperature=0.7)
        grown = add_scores_(grown, sketcher, batch, 0.7)
    assert grown.dtype == whole.dtype
    torch.testing.assert_close(grown, whole, rtol=1e-6, atol=1e-6)
    counted = {int(slot) for batch in made for slot in batch.slots} - {-1}
    assert set(whole.abs().sum(1).nonzero().flatten().tolist()) == counted


def test_the_sketch_has_rows_for_its_own_samples_only(monkeypatch):
    sketcher, asked = ScoreSketcher(tiny_model(), dim=256), []
    sketch = sketcher.sketch
    monkeypatch.setattr(sketcher, "sketch", lambda *a, **k: asked.append(a[4]) or sketch(*a, **k))
    (batch,) = batches([4000, 17, 4000], max_tokens=100)
    total = add_scores_(torch.zeros(8192, 256), sketcher, batch, 1.0)
    assert asked == [2]
    assert total.abs().sum(1).nonzero().flatten().tolist() == [17, 4000]


def test_ranks_add_up_in_place_block_by_block(monkeypatch):
    monkeypatch.setattr(score_sums, "_BLOCK", 8)

    class Two(Ranks):
        def __init__(self):
            super().__init__(CPU)
            self.count, self.sizes = 2, []

        def sum(self, tensor):
            self.sizes.append(tensor.numel())
            return 2 * tensor

    ranks, total = Two(), torch.arange(21.0).view(7, 3)
    expected = 2 * total
    assert sum_over_ranks_(total, ranks) is total
    assert torch.equal(total, expected)
    assert sum(ranks.sizes) == 21
    assert max(ranks.sizes) <= 8
