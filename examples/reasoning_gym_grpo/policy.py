"""The policy: a small Llama from a config, on characters. Nothing is downloaded."""

from __future__ import annotations

import re
import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.interference import model as interference
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
    return interference.make_model(tokenizer, seed, hidden=hidden, layers=layers, positions=tokenizer.model_max_length)
