"""Reaching the gradient before the optimizer step, whatever engine holds it."""

from passk_guard.mitigation.engines.choose import choose_engine
from passk_guard.mitigation.engines.deepspeed.restore import untraced
from passk_guard.mitigation.engines.protocol import GradientEngine, Parts

__all__ = ["GradientEngine", "Parts", "choose_engine", "untraced"]
