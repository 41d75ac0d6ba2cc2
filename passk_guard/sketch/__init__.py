"""Sketched score vectors: random projections of grad log pi(y | x), with a few thousand numbers each."""

from passk_guard.sketch.batches import TokenBatch, filler_batch, token_batches
from passk_guard.sketch.coverage import Coverage
from passk_guard.sketch.sketcher import Method, ScoreSketcher

__all__ = ["Coverage", "Method", "ScoreSketcher", "TokenBatch", "filler_batch", "token_batches"]
