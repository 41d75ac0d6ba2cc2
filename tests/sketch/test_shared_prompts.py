"""Completions side by side behind one prompt: the same samples, and the same score sums as one completion at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passk_guard.sketch import ScoreSketcher, halves, token_batches, unshared
from passk_guard.utils.errors import GuardError
from tests.helpers.tiny import tiny_model
from tests.sketch.oracle import oracle_sketch, relative_error
from tests.sketch.test_exactness import in_float64_throughout

PROMPTS = [[9, 10, 11, 12], [13], [14, 15]]
SAMPLES = st.lists(
    st.tuples(st.sampled_from(PROMPTS), st.lists(st.integers(0, 75), max_size=8), st.integers(-1, 4)), max_size=12
)


def batches_of(samples, max_tokens, shared=True, room=30):
    prompts, completions, slots = ([s[i] for s in samples] for i in range(3))
    groups = slots if shared else None
    return list(
        token_batches(
            prompts,
            completions,
            slots,
            max_tokens=max_tokens,
            pad_token_id=0,
            device="cpu",
            groups=groups,
            room=lambda prompt: room,
        )
    )


def samples_in(batch):
    alone = unshared(batch)
    return [
        (ids[attended.bool() & (completion == 0)].tolist(), ids[completion == 1].tolist(), int(slot))
        for ids, attended, completion, slot in zip(
            alone.input_ids, alone.attention_mask, alone.completion_mask, alone.slots, strict=True
        )
    ]


@settings(max_examples=100)
@given(SAMPLES, st.integers(1, 60), st.integers(0, 20))
def test_rows_and_their_halves_hold_every_kept_sample_once(samples, max_tokens, room):
    found = []
    for batch in batches_of(samples, max_tokens, room=room):
        inside = samples_in(batch)
        found += inside
        assert batch.row_slots.tolist() == [inside[i][2] for i in batch.first.tolist()]
        assert batch.input_ids.numel() <= max_tokens or len(inside) == 1
        pieces = [batch]
        while max(len(piece.slots) for piece in pieces) > 1:
            pieces = [half for piece in pieces for half in halves(piece)]
        assert [sample for piece in pieces for sample in samples_in(piece) if sample[2] != -1] == inside
    kept = sorted(s for s in samples if s[2] != -1)
    assert sorted(found) == kept


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_sums_behind_shared_prompts_are_those_of_autograd_per_completion(kind, attention):
    """In float64, where transformers' eager attention of Llama and Qwen2 takes its softmax in float32."""
    model = in_float64_throughout(tiny_model(kind).double())
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 7, (18,), generator=generator).tolist()
    samples = [
        (PROMPTS[i % 3], torch.randint(0, 76, (length,), generator=generator).tolist(), 2 * (i % 3) + i // 3 % 2)
        for i, length in enumerate(lengths)
    ]
    (alone,) = batches_of(samples, 1000, shared=False)
    names = ("input_ids", "attention_mask", "completion_mask", "slots")
    expected = oracle_sketch(model, {name: getattr(alone, name) for name in names}, 6, 0.7)
    shared = batches_of(samples, 40)
    assert sum(batch.input_ids.numel() for batch in shared) < 0.8 * alone.input_ids.numel()
    for closed in (True, False):
        sketcher, found = ScoreSketcher(model, method="identity"), 0
        sketcher._closed = closed  # the head in closed form, or as every other layer
        for batch in shared:
            found += sketcher.sketch(
                batch.input_ids, batch.attention_mask, batch.completion_mask, batch.row_slots, 6, temperature=0.7
            )
        assert relative_error(found, expected) < (1e-9 if kind == "gpt2" or attention == "sdpa" else 1e-5)


def test_completions_that_are_not_numbered_side_by_side_are_refused():
    mask = torch.tensor([[0, 1, 1, 3, 3]])
    with pytest.raises(GuardError, match="number the completions of a row"):
        ScoreSketcher(tiny_model(), method="identity").sketch(mask, torch.ones_like(mask), mask, torch.tensor([0]), 1)
