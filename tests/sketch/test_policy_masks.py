"""Completions of which the policy sampled some tokens alone: each score is that of autograd over those tokens."""

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
TURNS = st.lists(st.tuples(st.integers(0, 75), st.booleans()), max_size=8)
SAMPLES = st.lists(st.tuples(st.sampled_from(PROMPTS), TURNS, st.integers(-1, 4)), max_size=12)


def batches_of(samples, max_tokens=1000, shared=True):
    """Of (prompt, [(token, whether it was sampled)], slot)."""
    slots = [slot for _, _, slot in samples]
    return list(
        token_batches(
            [prompt for prompt, _, _ in samples],
            [[token for token, _ in turns] for _, turns, _ in samples],
            slots,
            max_tokens=max_tokens,
            pad_token_id=0,
            device="cpu",
            groups=slots if shared else None,
            room=lambda prompt: 30,
            policy_masks=[[int(own) for _, own in turns] for _, turns, _ in samples],
        )
    )


def samples_in(batch):
    alone, found = unshared(batch), []
    for ids, attended, mask, slot in zip(
        alone.input_ids, alone.attention_mask, alone.completion_mask, alone.slots, strict=True
    ):
        inside = mask != 0
        turns = list(zip(ids[inside].tolist(), (mask[inside] > 0).tolist(), strict=True))
        found.append((ids[attended.bool() & ~inside].tolist(), turns, int(slot)))
    return found


def sampled(generator, count=18):
    """Two turns of the policy, and the result of a tool between them; some begin with words of the environment."""
    for i in range(count):
        sizes = torch.randint(1, 4, (4,), generator=generator).tolist()
        tokens = iter(torch.randint(1, 76, (sum(sizes),), generator=generator).tolist())
        parts = [[next(tokens) for _ in range(size)] for size in sizes]
        yield PROMPTS[i % 3], parts if i % 4 == 0 else [[], *parts[1:]], 2 * (i % 3) + i // 3 % 2


def as_turns(parts):
    return [(token, own) for part, own in zip(parts, (False, True, False, True), strict=True) for token in part]


@settings(max_examples=100)
@given(SAMPLES, st.integers(1, 60))
def test_rows_and_their_halves_keep_what_was_sampled(samples, max_tokens):
    found = []
    for batch in batches_of(samples, max_tokens):
        inside = samples_in(batch)
        found += inside
        pieces = [batch]
        while max(len(piece.slots) for piece in pieces) > 1:
            pieces = [half for piece in pieces for half in halves(piece)]
        assert [sample for piece in pieces for sample in samples_in(piece) if sample[2] != -1] == inside
    assert sorted(found) == sorted(s for s in samples if s[2] != -1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("shared", [True, False])
def test_sums_are_those_of_autograd_over_the_sampled_tokens(kind, shared):
    model = in_float64_throughout(tiny_model(kind).double())
    samples = [(p, as_turns(parts), slot) for p, parts, slot in sampled(torch.Generator().manual_seed(3))]
    (alone,) = batches_of(samples, shared=False)
    batch = {"input_ids": alone.input_ids, "attention_mask": alone.attention_mask}
    batch |= {"completion_mask": alone.completion_mask.clamp(min=0), "slots": alone.slots}
    expected = oracle_sketch(model, batch, 6, 0.7)
    for closed in (True, False):
        sketcher, found = ScoreSketcher(model, method="identity"), 0
        sketcher._closed = closed
        for b in batches_of(samples, 60, shared):
            found += sketcher.sketch(b.input_ids, b.attention_mask, b.completion_mask, b.row_slots, 6, temperature=0.7)
        assert relative_error(found, expected) < (1e-9 if kind == "gpt2" else 1e-5)


@pytest.mark.parametrize("method", ["kronecker", "countsketch"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_sketch_is_that_of_the_turns_as_completions_of_what_came_before(method, shared):
    """grad log pi of a trajectory is the sum over its turns, each a completion behind everything before it."""
    model = in_float64_throughout(tiny_model().double())
    whole, turns = [], []
    for prompt, (before, first, result, second), slot in sampled(torch.Generator().manual_seed(4)):
        whole.append((prompt, as_turns([before, first, result, second]), slot))
        turns.append((prompt + before, [(token, True) for token in first], slot))
        turns.append((prompt + before + first + result, [(token, True) for token in second], slot))
    for closed in (True, False):
        sketcher = ScoreSketcher(model, 256, method)
        sketcher._closed = closed

        def summed(samples, shared, sketcher=sketcher):
            batches = batches_of(samples, 60, shared)
            given = [(b.input_ids, b.attention_mask, b.completion_mask, b.row_slots) for b in batches]
            return sum(sketcher.sketch(*tensors, 6, temperature=0.7) for tensors in given)

        assert relative_error(summed(whole, shared), summed(turns, False)) < 1e-5


def test_a_hole_behind_a_shared_prompt_is_refused():
    mask = torch.tensor([[0, 1, 0, 1, 2, 2]])
    given = [mask.abs(), torch.ones_like(mask), mask, torch.tensor([0])]
    with pytest.raises(GuardError, match="Pass -j on tokens of completion j"):
        ScoreSketcher(tiny_model(), method="identity").sketch(*given, 1)
