"""The policy: a small Llama from a config, on characters. Nothing is downloaded."""

from __future__ import annotations

import re
import string

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.reasoning_gym_grpo.tasks import KINDS

PAD, EOS = "<pad>", "<eos>"
MAX_ANSWER = 6  # tokens: five characters and end-of-sequence


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, except that what is the same in all prompts of a task is one token.

    Spelt out, the wording would be nine tenths of every sequence. Pad is 0, end-of-sequence is 1.
    """
    wording = [text for kind in KINDS.values() for text in kind.wording]
    characters = string.digits + string.ascii_letters + string.punctuation + " "
    tokens = dict.fromkeys([PAD, EOS, *wording, *characters])  # "?" is both wording and a character
    # No unknown token: a character outside the vocabulary is a bug of the caller, and raises.
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}))
    pieces = "|".join([*map(re.escape, sorted(wording, key=len, reverse=True)), "."])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",  # where TRL pads prompts
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, hidden: int = 128, layers: int = 3
) -> LlamaForCausalLM:
    """A randomly initialised model (0.7 million parameters), the same for the same seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
