"""Collation: every kept token in its place, right-padded, within the budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passk_guard.sketch import ScoreSketcher, filler_batch, token_batches
from passk_guard.utils.errors import GuardError
from tests.helpers.tiny import tiny_model

PAD = 99
TOKENS = st.integers(0, 75)
SAMPLES = st.lists(
    st.tuples(st.lists(TOKENS, min_size=1, max_size=6), st.lists(TOKENS, max_size=8), st.integers(-1, 4)),
    max_size=12,
)


def batches_of(samples, max_tokens):
    prompts, completions, slots = ([s[i] for s in samples] for i in range(3))
    return list(token_batches(prompts, completions, slots, max_tokens=max_tokens, pad_token_id=PAD, device="cpu"))


@settings(max_examples=60)
@given(SAMPLES, st.integers(1, 60))
def test_batches_hold_every_kept_sample_once(samples, max_tokens):
    found = []
    for batch in batches_of(samples, max_tokens):
        for ids, attended, completion, slot in zip(
            batch.input_ids, batch.attention_mask, batch.completion_mask, batch.slots, strict=True
        ):
            length = int(attended.sum())
            assert attended[:length].all()
            assert (ids[length:] == PAD).all()
            first = length - int(completion.sum())
            assert completion[first:length].all()
            found.append((ids[:first].tolist(), ids[first:length].tolist(), int(slot)))
    assert sorted(found) == sorted(s for s in samples if s[2] != -1)


@settings(max_examples=60)
@given(SAMPLES, st.integers(1, 60))
def test_batches_keep_to_the_budget_and_hold_no_column_of_padding(samples, max_tokens):
    widths = []
    for batch in batches_of(samples, max_tokens):
        assert batch.input_ids.numel() <= max_tokens or len(batch.slots) == 1
        assert batch.attention_mask.sum(0).min() >= 1
        widths.append(batch.input_ids.shape[1])
    assert widths == sorted(widths, reverse=True)


def test_the_sum_over_batches_is_the_sketch_of_all():
    samples = [([3, 4], [5, 6, 7], 0), ([8], [9], 1), ([1, 2, 3], [4] * 6, 0), ([5, 5], [6, 6], 2)]
    sketcher = ScoreSketcher(tiny_model("qwen2"), method="identity")

    def total(max_tokens):
        return sum(
            sketcher.sketch(b.input_ids, b.attention_mask, b.completion_mask, b.slots, 3)
            for b in token_batches(*zip(*samples, strict=True), max_tokens=max_tokens, pad_token_id=0, device="cpu")
        )

    torch.testing.assert_close(total(10), total(1000), rtol=1e-4, atol=1e-5)


def test_a_filler_batch_runs_and_counts_nowhere():
    batch = filler_batch(pad_token_id=0, device="cpu")
    assert batch.slots.tolist() == [-1]
    calls, model = [], tiny_model("qwen2")
    sketcher = ScoreSketcher(model, dim=64)
    sketcher.settle(batch.input_ids.device)
    model.register_forward_hook(lambda *_: calls.append(1))
    rows = sketcher.sketch(batch.input_ids, batch.attention_mask, batch.completion_mask, batch.slots, 3)
    assert len(calls) == 2 + 1  # two for the check of the padding, once
    assert rows.shape == (3, 64)
    assert rows.abs().max() == 0


def test_misuse_is_refused():
    with pytest.raises(GuardError, match="max_tokens"):
        batches_of([([1], [2], 0)], 0)
    with pytest.raises(GuardError, match="slot 3"):
        batches_of([([], [2], 3)], 10)
    with pytest.raises(GuardError, match="1, 1 and 2"):
        token_batches([[1]], [[2]], [0, 1], max_tokens=9, pad_token_id=0, device="cpu")
