"""Where completions come from: plain `generate`, a TRL trainer's own generation, or the training batch."""

from passk_guard.sampling.batch import BatchTap
from passk_guard.sampling.generate import GenerateSampler
from passk_guard.sampling.protocol import Sampler, Samples
from passk_guard.sampling.trl import TRLSampler

__all__ = ["BatchTap", "GenerateSampler", "Sampler", "Samples", "TRLSampler"]
