"""The samples of a prompt from copies of its cache: the same as from a pass of their own, on models that allow it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, MistralConfig

from passk_guard.probe.samplers import GenerateSampler
from tests.helpers.tiny import tiny_model, tiny_tokenizer

SHAPE = {"vocab_size": 76, "hidden_size": 16, "initializer_range": 0.3, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64}
ROWS = [{"prompt": text} for text in ("1", "1+2=", "a longer one, 3+4=", "1+3=", "5")]
TOKENS = 1 + 4 + 18 + 4 + 1


def windowed():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, **HEADS, sliding_window=6))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "a window"])
def test_samples_from_copies_are_those_from_whole_passes_over_fewer_tokens(kind):
    model, read = windowed() if kind == "a window" else tiny_model(kind), []
    forward = model.forward

    def counting(*args, **given):
        ids = given["input_ids"]
        read.append(ids.numel() if ids.shape[1] > 1 else 0)
        return forward(*args, **given)

    sampler = GenerateSampler(model, tiny_tokenizer(), max_new_tokens=8, batch_size=7)
    copied = sampler.sample(ROWS, 6, seed=3)
    assert sampler._copies
    sampler._copies = False
    assert sampler.sample(ROWS, 6, seed=3) == copied
    model.forward = counting
    tokens = []
    for copies in (True, False):
        sampler._copies = copies
        read.clear()
        sampler.sample(ROWS, 6, seed=3)
        tokens.append(sum(read))
    assert tokens[1] >= 6 * TOKENS
    assert tokens[0] < tokens[1] / 3


def shifting():
    model = tiny_model()
    forward = model.forward
    model.forward = lambda input_ids, attention_mask, past_key_values=None, position_ids=None, **rest: forward(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=None if position_ids is None else position_ids + input_ids.shape[1],
    )
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: AutoModelForCausalLM.from_config(MambaConfig(**SHAPE, state_size=4)), shifting],
    ids=["a state", "positions of its own"],
)
def test_other_models_read_each_prompt_once_a_sample(make):
    torch.manual_seed(0)
    sampler = GenerateSampler(make(), tiny_tokenizer(), max_new_tokens=4)
    state = torch.get_rng_state()
    first, again = (sampler.sample(ROWS, 3, seed=0) for _ in range(2))
    assert sampler._copies is False
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
