"""ZeRO-0: plain data parallelism; every rank holds the whole averaged gradient in `.grad`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from passk_guard.engines.deepspeed_base import DeepSpeedGradient, Take


class Zero0(DeepSpeedGradient):
    """Gradient parts: `.grad` of each trained parameter, in the model's order. The optimizer is torch's own."""

    sharded = False

    def _describe(self) -> str:
        return "DeepSpeed ZeRO-0"

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self._engine.module.parameters() if p.requires_grad and p.numel()]

    def _parts(self) -> list[Tensor]:
        # At a boundary DeepSpeed has filled in zeros where there was no gradient.
        return [p.grad for p in self._trained() if p.grad is not None]

    def _at_boundary(self) -> bool:
        return all(p.grad is None for p in self._engine.module.parameters())

    @contextmanager
    def _lend(self) -> Iterator[Take]:
        try:
            yield self._parts
        finally:
            for parameter in self._engine.module.parameters():
                parameter.grad = None
