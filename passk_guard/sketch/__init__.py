"""Sketched score vectors: random projections of grad log pi(y | x), with a few thousand numbers each."""

from passk_guard.sketch.batches import TokenBatch, filler_batch, halves, token_batches, unshared
from passk_guard.sketch.coverage import Coverage
from passk_guard.sketch.head import head_of
from passk_guard.sketch.shared_prompts import predictions, shared_positions, shares_prompts
from passk_guard.sketch.sketcher import Method, ScoreSketcher

__all__ = [
    "Coverage",
    "Method",
    "ScoreSketcher",
    "TokenBatch",
    "filler_batch",
    "halves",
    "head_of",
    "predictions",
    "shared_positions",
    "shares_prompts",
    "token_batches",
    "unshared",
]
