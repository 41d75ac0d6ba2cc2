"""Prompts that completions share: on which models they do, and that scores and sums stay what they are without."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, MistralConfig

from passk_guard.mitigation.protected_direction import pass1_loss
from passk_guard.probe.passes import Scorer, SharedPrompts
from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.probe.refresh import Refresher
from passk_guard.probe.rescoring import Rescorer, load_window, save_window
from passk_guard.sketch import ScoreSketcher
from passk_guard.utils.ranks import Ranks
from tests.helpers.tiny import tiny_model
from tests.sketch.models import PlainLM

ALONE = Ranks(torch.device("cpu"))
SHAPE = {"vocab_size": 76, "hidden_size": 16, "initializer_range": 0.3, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64}


def shared(model):
    return SharedPrompts(Scorer(model, ALONE, 0))


def from_config(config, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **options)


def ignoring(name, kind="llama"):
    """A model that takes an argument of shared prompts and does nothing with it."""
    model = tiny_model(kind)
    forward = model.forward

    def without(input_ids, attention_mask, position_ids=None, use_cache=None):
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        if position_ids is not None:
            del given[name]
        return forward(input_ids=input_ids, **given)

    model.forward = without
    return model


def called_flash():
    """A model whose attention is not even tried."""
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    model.forward = None
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_plain_attention_shares_prompts(kind, attention, dtype):
    model = tiny_model(kind).to(dtype)
    model.set_attn_implementation(attention)
    assert shared(model).hold(40)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ignoring("position_ids"),
        lambda: ignoring("attention_mask"),
        lambda: ignoring("position_ids", "gpt2"),
        lambda: from_config(BloomConfig(vocab_size=76, hidden_size=16, n_layer=2, n_head=2)),
        lambda: from_config(MambaConfig(**SHAPE, state_size=4)),
        lambda: PlainLM(),
        lambda: called_flash(),
    ],
    ids=["no positions", "no mask", "no learned positions", "alibi", "a state", "not of transformers", "flash"],
)
def test_other_models_do_not(make):
    assert not shared(make()).hold(8)


def test_a_window_of_attention_shares_prompts_as_long_as_samples_fit_into_it():
    made = shared(from_config(MistralConfig(**SHAPE, **HEADS, sliding_window=41)))
    assert made.hold(41)
    assert not made.hold(42)


@pytest.mark.parametrize("prompt", [1, 30, 200, 2000])
def test_rows_are_as_long_as_costs_least(prompt):
    def cost(behind):
        return (prompt + behind) * (6 * 16 + prompt + behind) / behind

    made = shared(tiny_model("gpt2", n_positions=10_000))
    assert cost(made.room(prompt)) <= 1.001 * min(map(cost, range(1, 10_000)))
    assert shared(tiny_model()).room(60) == 4, "positions end at 64"


PROMPTS = [[9, 10, 11, 12, 13, 14], [15, 16, 17], [18]]


def sampled(per_prompt=6):
    generator = torch.Generator().manual_seed(0)
    index = [x for x in range(3) for _ in range(per_prompt)]
    lengths = torch.randint(0, 6, (len(index),), generator=generator).tolist()
    completions = [torch.randint(6, 70, (length,), generator=generator).tolist() for length in lengths]
    verdicts = torch.tensor([1, 0, 0, 1, 1, 0] * 3, dtype=torch.int8)
    rollouts = Rollouts([{}] * len(index), index, [PROMPTS[x] for x in index], completions, [""] * len(index), 3, 0.7)
    return rollouts, Outcomes(verdicts)


@pytest.mark.parametrize("max_tokens", [1, 24, 1000])
def test_windows_behind_shared_prompts_are_those_without_also_where_a_resumed_run_shares_none(max_tokens, tmp_path):
    model, keys = tiny_model(), ("a", "b", "c")
    plain = Rescorer(model, ALONE, max_tokens, 0)
    sharing = dataclasses.replace(plain, shared=shared(model))
    expected, window = (scorer.open(*sampled(), keys, 0) for scorer in (plain, sharing))
    torch.testing.assert_close(window.log_probs, expected.log_probs, rtol=0, atol=1e-5)
    assert torch.equal(window.correct, expected.correct)
    if max_tokens > 1:
        tokens = [sum(batch.attention_mask.sum() for batch in w.batches) for w in (window, expected)]
        assert tokens[0] < 0.8 * tokens[1]
    save_window(window, tmp_path / "window.pt")
    again = load_window(tmp_path / "window.pt", torch.device("cpu"))
    assert torch.equal(sharing.log_ratios(again), torch.zeros(3, 6, dtype=torch.float64))
    torch.testing.assert_close(plain.log_ratios(again), torch.zeros(3, 6, dtype=torch.float64), rtol=0, atol=1e-5)


def short(model, most):
    """Memory runs out in a pass of more than `most` tokens."""
    forward = model.forward

    def limited(input_ids, **options):
        if input_ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids=input_ids, **options)

    model.forward = limited
    return model


@pytest.mark.parametrize("most", [1000, 45, 20])
def test_a_refresh_and_its_direction_are_those_without_shared_prompts(most):
    model = tiny_model()
    plain = Refresher(ScoreSketcher(model, method="identity"), ALONE, 2, 1000, 0)
    sharing = dataclasses.replace(plain, shared=shared(model))
    expected = plain.run(sampled, (), 0)
    short(model, most)
    found = sharing.run(sampled, (), 0)
    torch.testing.assert_close(found.probe.gram, expected.probe.gram, rtol=1e-4, atol=1e-5)
    assert sum(len(batch.slots) for batch in found.batches) >= 18
    if most == 1000:
        assert found.batches[0].attention_mask.sum() < 0.9 * expected.batches[0].attention_mask.sum()
        assert len(dataclasses.replace(sharing, keeps_log_probs=True).run(sampled, (), 0).log_probs[0]) == 18

    def direction(refresh):
        model.zero_grad()
        for batch in refresh.batches:
            pass1_loss(refresh, 1)(model, batch).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    model.forward = type(model).forward.__get__(model)
    torch.testing.assert_close(direction(found), direction(expected), rtol=1e-4, atol=1e-5)
