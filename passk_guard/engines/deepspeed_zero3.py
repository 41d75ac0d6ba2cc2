"""ZeRO-3: parameters and gradients are sharded, the gradient in one persistent buffer per rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, ClassVar

from torch import Tensor

from passk_guard.engines.deepspeed_base import DeepSpeedGradient, Take
from passk_guard.engines.deepspeed_lent import Lent
from passk_guard.utils.errors import GuardError
from passk_guard.utils.private_api import Seam, check, seams


class Zero3(DeepSpeedGradient):
    """Gradient part: the flat buffer that the tensors in `averaged_gradients` are views of.

    The buffer is not cleared by a step: the first micro-batch writes over it. Parameters that training leaves unused
    keep what it holds, so a probe gives it its contents back.
    """

    needs: ClassVar[tuple[Seam, ...]] = (seams.ZERO3,)

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        check(seams.ZERO3_SHARDER, self._optimizer.parameter_offload)
        for parameter in islice(engine.module.parameters(), 1):
            check(seams.ZERO3_PARAMETER, parameter)

    def _describe(self) -> str:
        return "DeepSpeed ZeRO-3"

    def _parts(self) -> list[Tensor]:
        flat = self._optimizer.grad_partitions_flat_buffer
        groups = (self._optimizer.averaged_gradients[i] for i in range(len(self._optimizer.fp16_groups)))
        views = [view for group in groups for view in group]
        storage = flat.untyped_storage().data_ptr()
        if sum(v.numel() for v in views) != flat.numel() or any(
            v.numel() and v.untyped_storage().data_ptr() != storage for v in views
        ):
            raise GuardError(
                "Expected ZeRO-3's averaged_gradients to be views of grad_partitions_flat_buffer; found tensors of "
                "their own. Train all parameters that the optimizer holds (requires_grad), or mitigate by `reweight`."
            )
        return [flat]

    def _at_boundary(self) -> bool:
        seen = self._optimizer._epilogue_ran_this_backward
        return self._optimizer.micro_step_id == 0 and not seen

    @contextmanager
    def _lend(self) -> Iterator[Take]:
        lent = Lent([self._optimizer.grad_partitions_flat_buffer])
        try:
            yield lent.take
        finally:
            self._clear()
            lent.restore()

    @contextmanager
    def _back_to_rest(self) -> Iterator[None]:
        gathered = [p for p in self._optimizer.persistent_parameters if p.ds_status.name == "AVAILABLE"]
        try:
            yield
        except BaseException:
            for module in self._engine.module.modules():
                if hasattr(module._parameters, "_in_forward"):
                    module._parameters._in_forward = False
            self._optimizer.parameter_offload.partition_all_parameters()
            if gathered:
                gathered[0].all_gather(gathered)
            raise
