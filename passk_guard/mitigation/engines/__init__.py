"""Reaching the gradient before the optimizer step, whatever engine holds it."""

from passk_guard.mitigation.engines.choose import choose_engine
from passk_guard.mitigation.engines.protocol import GradientEngine, Parts
from passk_guard.utils.isolation import untraced

__all__ = ["GradientEngine", "Parts", "choose_engine", "untraced"]
