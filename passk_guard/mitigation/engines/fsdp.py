"""FSDP2 (`fully_shard`): every rank holds its shard of each gradient, the local tensor of a DTensor in `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from passk_guard.mitigation.engines.backward import BackwardEngine
from passk_guard.mitigation.engines.protocol import Batch
from passk_guard.utils.private_api import REWEIGHT, requires

_requires = partial(requires, "torch", applies="projecting gradients under FSDP2", instead=REWEIGHT)


class ShardedEngine(BackwardEngine):
    """Gradient access under FSDP2 on a mesh of one dimension.

    Args:
        trainer: a transformers Trainer whose train() has begun.
        model: with `fully_shard` applied to it; its trained parameters are DTensors on the same mesh.
    """

    module_needs = _requires("FSDPModule", _get_fsdp_state="ends an interrupted probe")
    state_needs = _requires("FSDPState", _root_post_backward_final_callback="ends an interrupted probe")

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        super().__init__(trainer, model, "fsdp2")
        self._model = model
        self._root = next(m for m in model.modules() if isinstance(m, FSDPModule))
        self.module_needs.check(self._root)
        self.state_needs.check(self._root._get_fsdp_state())
        self._group = cast(DTensor, self._parameters[0]).device_mesh.get_group()

    def probe_gradient(
        self,
        batches: Sequence[Batch],
        loss: Callable[[nn.Module, Batch], Tensor],
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """See `GradientEngine.probe_gradient`.

        Each batch is reduced separately: otherwise every rank would hold a whole unsharded gradient in between.
        Forward and backward gather weights, so a `loss` must raise on all ranks or on none, as in training itself.
        """
        scale = self.loss_scale()
        before = [p.grad for p in self._parameters]
        try:
            for parameter in self._parameters:
                parameter.grad = None
            with torch.enable_grad():
                for batch in batches:
                    (loss(self._model, batch) * scale).backward()
            return [self._harvest(p, scale, dtype or torch.float32) for p in self._parameters]
        except Exception:
            self._end_pass()
            raise
        finally:
            for parameter, grad in zip(self._parameters, before, strict=True):
                parameter.grad = grad

    def _harvest(self, parameter: nn.Parameter, scale: float, dtype: torch.dtype) -> Tensor:
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
        return self._local(grad).to(dtype).div_(scale)

    def _end_pass(self) -> None:
        """Shard everything again after an interrupted forward or backward, as the end of a backward does."""
        self._root._get_fsdp_state()._root_post_backward_final_callback()

    def _local(self, tensor: Tensor) -> Tensor:
        return cast(DTensor, tensor).to_local().detach()

    def _over_ranks(self, scalars: Tensor) -> Tensor:
        dist.all_reduce(scalars, group=self._group)
        return scalars
