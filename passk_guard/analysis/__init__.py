"""A checkpoint, measured once: sampled, scored, sketched, and what follows for pass@k training from it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passk_guard.analysis.results import Analysis
    from passk_guard.analysis.rollouts import analyze_rollouts
    from passk_guard.analysis.run import analyze
    from passk_guard.analysis.settings import Settings

__all__ = ["Analysis", "Settings", "analyze", "analyze_rollouts"]
_MODULE_OF = {"Analysis": "results", "Settings": "settings", "analyze": "run", "analyze_rollouts": "rollouts"}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"passk_guard.analysis.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
