"""Optimizer offload to the CPU: the gradient is complete only in the fp32 master partition there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from passk_guard.mitigation.engines.deepspeed.base import DeepSpeedGradient, Take, synchronize
from passk_guard.mitigation.engines.deepspeed.restore import Lent
from passk_guard.mitigation.engines.deepspeed.stages import Zero3, Zero12

_CLIPPING = {
    "norm_for_param_grads": "norms to clip by, taken again after an edit",
    "grad_position": "where the gradients of those norms lie",
}


class _Offloaded(DeepSpeedGradient):
    """Gradient parts: `.grad` of each flat fp32 partition, on the CPU.

    DeepSpeed takes the norm of each parameter's share during backward and clips by those: after an edit they are taken
    again, else clipping would use the norms of a gradient that is no more.
    """

    @abstractmethod
    def _masters(self) -> list[Tensor]:
        """Flat fp32 partitions of the parameters."""

    @abstractmethod
    def _share(self, position: Any) -> Tensor:
        """View of the gradient at one entry of `grad_position`."""

    @abstractmethod
    def _accumulators(self) -> list[Tensor]:
        """Persistent buffers that micro-batches are summed in."""

    def _parts(self) -> list[Tensor]:
        synchronize()
        return [master.grad for master in self._masters() if master.grad is not None]

    @torch.no_grad()
    def _after_edit(self) -> None:
        norms = self._optimizer.norm_for_param_grads
        for key, norm in norms.items():
            share = self._share(self._optimizer.grad_position[key])
            norms[key] = share.to(norm.dtype).norm(2).to(norm.device)

    @contextmanager
    def _lend(self) -> Iterator[Take]:
        accumulators = Lent(self._accumulators())
        gradients = Lent(self._parts())

        def take() -> list[Tensor]:
            synchronize()
            return gradients.take()

        try:
            yield take
        finally:
            self._clear()
            accumulators.restore()
            gradients.restore()


class Zero12Offload(_Offloaded, Zero12):
    """ZeRO-1 and ZeRO-2 with the optimizer on the CPU."""

    needs = Zero12.needs.also(
        single_partition_of_fp32_groups="hold the gradient",
        accumulated_grads_in_cpu="sums of micro-batches",
        **_CLIPPING,
    )

    def _describe(self) -> str:
        return f"{Zero12._describe(self)}, optimizer offloaded"

    def _masters(self) -> list[Tensor]:
        return self._optimizer.single_partition_of_fp32_groups

    def _share(self, position: Any) -> Tensor:
        group, _, offset, size = position
        return self._masters()[group].grad.view(-1).narrow(0, offset, size)

    def _accumulators(self) -> list[Tensor]:
        return list(self._optimizer.accumulated_grads_in_cpu.values())


class Zero3Offload(_Offloaded, Zero3):
    """ZeRO-3 with the optimizer on the CPU, and the parameters too when they are offloaded."""

    needs = Zero3.needs.also(fp32_partitioned_groups_flat="hold the gradient", **_CLIPPING)

    def _describe(self) -> str:
        return f"{Zero3._describe(self)}, optimizer offloaded"

    def _masters(self) -> list[Tensor]:
        return self._optimizer.fp32_partitioned_groups_flat

    def _share(self, position: Any) -> Tensor:
        group, offset, size = position
        return self._masters()[group].grad.narrow(0, offset, size)

    def _accumulators(self) -> list[Tensor]:
        return [self._optimizer.grad_partitions_flat_buffer]
