"""Where completions come from: plain `generate`, a TRL trainer's own generation, or the training batch."""

from passk_guard.probe.samplers.generate import GenerateSampler
from passk_guard.probe.samplers.protocol import Sampler, Samples
from passk_guard.probe.samplers.training_batch import BatchTap
from passk_guard.probe.samplers.trl import TRLSampler

__all__ = ["BatchTap", "GenerateSampler", "Sampler", "Samples", "TRLSampler"]
