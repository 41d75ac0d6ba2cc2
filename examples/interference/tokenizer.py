"""One token per character, built in memory: nothing is downloaded, and ids are readable in a debugger.

Left out: a beginning-of-sequence token and a chat template, since prompts here are plain strings that TRL tokenises
as they are.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .task import ALPHABET

PAD, EOS = "<pad>", "<eos>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A character-level tokenizer of the task's alphabet; pad is 0, end-of-sequence is 1."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *ALPHABET])}
    # No unknown token: a character outside the alphabet is a bug of the caller, and raises.
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",  # where TRL expects the padding of prompts
        model_max_length=16,
        clean_up_tokenization_spaces=False,
    )
