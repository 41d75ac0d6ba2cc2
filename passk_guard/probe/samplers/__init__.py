"""Where completions come from: plain `generate`, a TRL trainer's own generation, or the training batch."""

from typing import Any

from passk_guard.probe.samplers.generate import GenerateSampler
from passk_guard.probe.samplers.protocol import Sampler, Samples
from passk_guard.probe.samplers.training_batch import BatchTap
from passk_guard.probe.samplers.trl import TRLSampler
from passk_guard.utils.errors import GuardError
from passk_guard.utils.private_api import is_trl

__all__ = ["BatchTap", "GenerateSampler", "Sampler", "Samples", "TRLSampler", "choose_sampler"]


def choose_sampler(
    model: Any,
    tokenizer: Any,
    *,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    trainer: Any = None,
    tool_timeout: float | None = None,
) -> Sampler:
    """Choose a TRL trainer's own generation, which has its own settings, or else `model.generate` with these.

    Args:
        model, tokenizer, temperature, max_new_tokens, batch_size: as for `GenerateSampler`.
        trainer: of the model, where it is in training.
        tool_timeout: as for `TRLSampler`.

    Raises:
        GuardError: as the samplers, or no tokenizer.
    """
    if trainer is not None and (is_trl(trainer) or hasattr(trainer, "_generate_single_turn")):
        return TRLSampler(trainer, tool_timeout=tool_timeout)
    if tokenizer is None:
        raise GuardError("Expected a trainer with a tokenizer to sample with; pass `processing_class` to the trainer.")
    return GenerateSampler(
        model, tokenizer, temperature=temperature, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
