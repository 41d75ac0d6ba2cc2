"""BF16_Optimizer: ZeRO-1 in bf16 with fp32 accumulation, whose gradient is replicated although its state is sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from passk_guard.engines.deepspeed_base import DeepSpeedGradient, Take
from passk_guard.engines.deepspeed_lent import Lent
from passk_guard.utils.private_api import seams


class Bf16(DeepSpeedGradient):
    """Gradient parts: `fp32_groups_gradients_flat`, one flat fp32 tensor per parameter group, the same on each rank.

    Each rank clips by the norm of its own whole copy and steps on its partition of it: the whole copy is edited.
    """

    sharded = False
    needs = (seams.BF16,)

    def _describe(self) -> str:
        return "DeepSpeed ZeRO-1 (BF16_Optimizer)"

    def _parts(self) -> list[Tensor]:
        return list(self._optimizer.fp32_groups_gradients_flat)

    def _at_boundary(self) -> bool:
        return not any(any(group) for group in self._optimizer.fp32_groups_has_gradients)

    @contextmanager
    def _lend(self) -> Iterator[Take]:
        lent = Lent(self._parts())
        try:
            yield lent.take
        finally:
            self._clear()  # the buffers, which are zero at a boundary, and which of them were filled
