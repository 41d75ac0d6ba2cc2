"""The blocked sums and their Gram matrix, against plain ones; and the budget of a pass."""

import pytest
import torch

from passk_guard.probe import score_sums
from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.probe.refresh import Refresher
from passk_guard.probe.score_sums import add_scores_, gram_matrix, sum_over_ranks_
from passk_guard.sketch import ScoreSketcher, filler_batch, token_batches
from passk_guard.utils.ranks import Ranks
from tests.helpers.live_bytes import most_alive
from tests.helpers.tiny import tiny_model

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


def rollouts(lengths, per_prompt=2):
    """Samples of these lengths in tokens, two and more to a prompt; every second one counts as correct."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 70, (length,), generator=generator).tolist() for length in lengths]
    made = Rollouts(
        rows=[{}] * len(ids),
        prompt_index=[i // per_prompt for i in range(len(ids))],
        prompt_ids=[row[:1] for row in ids],
        completion_ids=[row[1:] for row in ids],
        completions=["x"] * len(ids),
        num_prompts=len(ids) // per_prompt,
    )
    return made, Outcomes(torch.tensor([i % 2 for i in range(len(ids))], dtype=torch.int8))


def refresh(model, lengths, max_tokens):
    refresher = Refresher(ScoreSketcher(model, dim=256), Ranks(CPU), 2, max_tokens, 0)
    return refresher.run(lambda: rollouts(lengths), (), 0)


@pytest.mark.parametrize("max_tokens", [24, 40, 1000])
def test_no_pass_of_a_refresh_is_above_the_budget_but_that_of_one_longer_sample(max_tokens):
    model, passes = tiny_model(), []
    handle = model.register_forward_pre_hook(
        lambda m, a, k: passes.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    lengths = [5, 30, 8, 13, 21, 7, 19, 3, 24, 11, 9, 26]
    remark = refresh(model, lengths, max_tokens).remark
    handle.remove()
    del passes[:3]  # a short one of two rows, and two of one row, to see whether the model reads padding
    assert sum(rows for rows, _ in passes) == len(lengths)
    above = [(rows, width) for rows, width in passes if rows * width > max_tokens]
    assert above == [(1, length) for length in sorted(lengths, reverse=True) if length > max_tokens]
    if above:
        assert f"a sample of 30 tokens, above max_probe_tokens={max_tokens}" in remark
    else:
        assert remark is None


def test_the_peak_of_a_refresh_grows_with_the_budget_and_not_with_the_prompts():
    model = tiny_model(vocab_size=2048)

    def peak(prompts, max_tokens):
        return most_alive(lambda: refresh(model, [32] * (2 * prompts), max_tokens))

    peak(4, 256)  # what the first pass makes and the sketch keeps
    small, more_prompts, larger_passes = peak(16, 256), peak(96, 256), peak(96, 1024)
    assert more_prompts < 1.2 * small
    assert larger_passes > 2 * more_prompts
