"""A checkpoint looked at once: sampled, scored, sketched, and what follows for pass@k training from it."""

from passk_guard.analysis.record import Analysis
from passk_guard.analysis.run import analyze
from passk_guard.analysis.settings import Settings

__all__ = ["Analysis", "Settings", "analyze"]
