"""The policy: a Llama of 648k parameters, small enough for a warm start and a GRPO run in minutes on a CPU."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


def make_model(
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    hidden: int = 128,
    layers: int = 3,
    heads: int = 4,
    positions: int = 16,  # 7 of the prompt, 5 of the answer
) -> LlamaForCausalLM:
    """A randomly initialised model, the same for the same seed whatever the global RNG was before.

    Input and output embeddings are untied, and there is no dropout: train and eval mode compute the same function.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
