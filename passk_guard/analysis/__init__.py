"""A checkpoint looked at once: sampled, scored, sketched, and what follows for pass@k training from it."""

from passk_guard.analysis.analyze import analyze
from passk_guard.analysis.results import Analysis
from passk_guard.analysis.settings import Settings

__all__ = ["Analysis", "Settings", "analyze"]
