"""ZeRO-1 and ZeRO-2: each rank holds the averaged gradient of its slice of every parameter group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor

from passk_guard.engines.deepspeed_base import DeepSpeedGradient, Take
from passk_guard.utils.private_api import Seam, seams

_NO_MICRO_STEP = -1


class Zero12(DeepSpeedGradient):
    """Gradient parts: `averaged_gradients`, one list of tensors per parameter group, of which a step makes a flat one.

    The flat partition is built from these tensors inside the step, so writing to them reaches the optimizer, the
    overflow check and the clipping norm. Alignment padding that DeepSpeed marks as such is left out.
    """

    needs: ClassVar[tuple[Seam, ...]] = (seams.ZERO12,)

    def _describe(self) -> str:
        return f"DeepSpeed ZeRO-{2 if self._optimizer.partition_gradients else 1}"

    def _parts(self) -> list[Tensor]:
        groups = (self._optimizer.averaged_gradients[i] for i in range(len(self._optimizer.bit16_groups)))
        return [part for group in groups for part in group if not getattr(part, "_zero_padding", False)]

    def _at_boundary(self) -> bool:
        held = (p.grad is not None for group in self._optimizer.bit16_groups for p in group)
        return self._optimizer.micro_step_id == _NO_MICRO_STEP and not any(held)

    @contextmanager
    def _lend(self) -> Iterator[Take]:
        # averaged_gradients, all_grad_tensors and micro_step_id are put back with the rest of the optimizer's
        # attributes; zero_grad alone would leave them, and the probe would be added to the next training gradient.
        try:
            yield lambda: [part.detach().clone() for part in self._parts()]
        finally:
            self._clear()
