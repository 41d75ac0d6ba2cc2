"""Gradients in `.grad`: whole on every rank (one process, DistributedDataParallel), or each its shard (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from passk_guard.mitigation.engines.backward import BackwardEngine
from passk_guard.mitigation.engines.protocol import Batch
from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.private_api import REWEIGHT, requires

_requires = partial(requires, "torch", applies="projecting gradients on a plain model or DDP", instead=REWEIGHT)
_requires_fsdp = partial(requires, "torch", applies="projecting gradients under FSDP2", instead=REWEIGHT)


@contextmanager
def stand_ins(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Put new leaves in the place of `parameters` throughout `model`, and take them out again on exit.

    A stand-in shares the memory of its parameter and has a separate `.grad`. What is attached to the parameter's
    accumulation node does not run: DistributedDataParallel's reducer (with `static_graph` a single backward before its
    first step leaves the ranks with different weights and no error), and hooks that run an optimizer as soon as a
    gradient is there. Plain tensor hooks, which change a gradient on its way, are taken along.

    Args:
        model: not wrapped; may use one parameter in several places.
        parameters: leaves of it.

    Yields:
        The stand-ins, in the order of `parameters`.
    """
    twins = {id(parameter): _twin(parameter) for parameter in parameters}
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in twins
    ]
    try:
        for module, name, parameter in places:
            module._parameters[name] = twins[id(parameter)]
        yield [twins[id(parameter)] for parameter in parameters]
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def _twin(parameter: nn.Parameter) -> nn.Parameter:
    twin = nn.Parameter(parameter.detach())
    vars(twin).update(vars(parameter))  # marks such as `_is_hf_initialized`
    for hook in (parameter._backward_hooks or {}).values():
        twin.register_hook(hook)
    return twin


class NativeEngine(BackwardEngine):
    """Gradient access for a model whose gradients are replicated: the same tensors on every rank.

    Args:
        trainer: a transformers Trainer whose train() has begun.
        model: the bare module, as `loss` gets it in `probe_gradient`.
        group: processes that train replicas of it; None in a single one.
    """

    module_needs = _requires("Module", _parameters="stand-ins take the places of parameters")
    parameter_needs = _requires(
        "Tensor",
        _backward_hooks="a stand-in takes hooks along",
        _post_accumulate_grad_hooks="finds optimizers inside the backward pass",
    )

    def __init__(self, trainer: Any, model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        self.module_needs.check(model)
        self.parameter_needs.check(next(p for p in model.parameters() if p.requires_grad))
        super().__init__(trainer, model, "plain" if group is None else "ddp")
        self._model = model
        self._group = group

    def probe_gradient(
        self,
        batches: Sequence[Batch],
        loss: Callable[[nn.Module, Batch], Tensor],
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """See `GradientEngine.probe_gradient`.

        Runs on stand-ins of the parameters, and not through DistributedDataParallel: the sum over batches is averaged
        over ranks at the end, one tensor at a time. Nothing of the training is involved, and a rank that fails is known
        to the others before any of them waits for it.

        Raises:
            FailedRefresh: on the ranks where `loss` went well while it raised on another one.
        """
        scale = self.loss_scale()
        with stand_ins(self._model, self._parameters) as leaves:
            try:
                with torch.enable_grad():
                    for batch in batches:
                        (loss(self._model, batch) * scale).backward()
            except Exception:
                self._failed_anywhere(True)
                raise
        if self._failed_anywhere(False):
            raise FailedRefresh("the probe loss raised on another rank; its log has the reason")
        return [self._harvest(leaf, scale).to(dtype or torch.float32) for leaf in leaves]

    def _harvest(self, leaf: nn.Parameter, scale: float) -> Tensor:
        """Mean over ranks of a stand-in's gradient, in at least fp32; frees the gradient."""
        wide = torch.promote_types(leaf.dtype, torch.float32)
        total = torch.zeros_like(leaf, dtype=wide) if leaf.grad is None else leaf.grad.to(wide).contiguous()
        leaf.grad = None
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return total.div_(scale * (1 if self._group is None else self._group.size())).detach()

    def _failed_anywhere(self, here: bool) -> bool:
        if self._group is None:
            return here
        flag = torch.tensor([int(here)], device=self._accelerator.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def _over_ranks(self, scalars: Tensor) -> Tensor:
        """Rank 0's numbers: equal everywhere already, up to the last bit where the devices differ."""
        if self._group is not None:
            dist.broadcast(scalars, src=dist.get_global_rank(self._group, 0), group=self._group)
        return scalars


class ShardedEngine(BackwardEngine):
    """Gradient access under FSDP2 on a mesh of one dimension.

    Args:
        trainer: a transformers Trainer whose train() has begun.
        model: with `fully_shard` applied to it; its trained parameters are DTensors on the same mesh.
    """

    module_needs = _requires_fsdp("FSDPModule", _get_fsdp_state="ends an interrupted probe")
    state_needs = _requires_fsdp("FSDPState", _root_post_backward_final_callback="ends an interrupted probe")

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
