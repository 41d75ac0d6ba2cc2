"""The stages of DeepSpeed, with and without offload: where each holds the gradient, and what a probe must put back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from passk_guard.mitigation.engines.deepspeed.base import DeepSpeedGradient, Take, synchronize
from passk_guard.mitigation.engines.deepspeed.restore import Lent
from passk_guard.utils.errors import GuardError
from passk_guard.utils.private_api import REWEIGHT, Requires, requires

_requires = partial(requires, "deepspeed", instead=REWEIGHT)
_ZERO3 = "projecting gradients under ZeRO-3"
_NO_MICRO_STEP = -1
_REFUSED = "what was never measured is refused"
_RESTORED = "put back after a probe"
_OF_ALL = {
    "_backward_hook_state": _RESTORED,
    "optimizer": "Muon is refused",
    "torch_autocast_gradscaler": _REFUSED,
    "dp_process_group": "the ranks that share the data",
    "zero_grad": "clears a probe",
}
_OF_ZERO = _OF_ALL | {
    "ipg_buckets": _RESTORED,
    "sequence_parallel_size": _REFUSED,
    "master_weights_and_grads_dtype": _REFUSED,
    "averaged_gradients": "the gradient",
    "micro_step_id": "whether anything was accumulated",
    "loss_scale": "is in every gradient of fp16",
}
_CLIPPING = {
    "norm_for_param_grads": "norms to clip by, taken again after an edit",
    "grad_position": "where the gradients of those norms lie",
}


class Zero0(DeepSpeedGradient):
    """ZeRO-0, plain data parallelism: every rank holds the whole averaged gradient.

    Gradient parts: `.grad` of each trained parameter, in the model's order. The optimizer is torch's own.
    """

    sharded = False

    def _describe(self) -> str:
        return "DeepSpeed ZeRO-0"

    def _parts(self) -> list[Tensor]:
        # At a boundary DeepSpeed has filled in zeros where there was no gradient.
        trained = (p for p in self._engine.module.parameters() if p.requires_grad and p.numel())
        return [p.grad for p in trained if p.grad is not None]

    def _at_boundary(self) -> bool:
        return all(p.grad is None for p in self._engine.module.parameters())

    @contextmanager
    def _lend(self) -> Iterator[Take]:
        try:
            yield self._parts
        finally:
            for parameter in self._engine.module.parameters():
                parameter.grad = None


class Zero12(DeepSpeedGradient):
    """ZeRO-1 and ZeRO-2: each rank holds the averaged gradient of its slice of every parameter group.

    Gradient parts: `averaged_gradients`, one list of tensors per parameter group. The flat partition is built from them
    inside the step, so writing to them reaches the optimizer, the overflow check and the clipping norm. Alignment
    padding that DeepSpeed marks as such is left out.
    """

    needs: ClassVar[Requires] = _requires(
        "DeepSpeedZeroOptimizer",
        "projecting gradients under ZeRO-1 and ZeRO-2",
        bit16_groups="the parameters",
        partition_gradients="stage 1 or 2",
        cpu_offload="where the gradient lies",
        **_OF_ZERO,
    )

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


class Zero3(DeepSpeedGradient):
    """ZeRO-3: parameters and gradients are sharded, the gradient in one persistent buffer per rank.

    Gradient part: the flat buffer that the tensors in `averaged_gradients` are views of. It is not cleared by a step:
    the first micro-batch writes over it. Parameters that training leaves unused keep what it holds, so a probe gives
    it its contents back.
    """

    needs: ClassVar[Requires] = _requires(
        "DeepSpeedZeroOptimizer_Stage3",
        _ZERO3,
        grad_partitions_flat_buffer="the gradient",
        fp16_groups="the parameters",
        parameter_offload="shards parameters again",
        persistent_parameters="gathered at rest",
        offload_optimizer="where the gradient lies",
        _epilogue_ran_this_backward="whether anything was accumulated",
        **_OF_ZERO,
    )
    sharder_needs = _requires("DeepSpeedZeRoOffload", _ZERO3, partition_all_parameters="after an interrupted probe")
    parameter_needs = _requires(
        "sharded parameter",
        _ZERO3,
        ds_status="whether it is gathered at rest",
        all_gather="after an interrupted probe",
    )

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.sharder_needs.check(self._optimizer.parameter_offload)
        for parameter in islice(engine.module.parameters(), 1):
            self.parameter_needs.check(parameter)

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
                "Expected ZeRO-3's averaged_gradients to be views of grad_partitions_flat_buffer; found separate "
                "tensors. Train all parameters that the optimizer holds (requires_grad), or mitigate by `reweight`."
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


class Bf16(DeepSpeedGradient):
    """BF16_Optimizer: ZeRO-1 in bf16 with fp32 accumulation; the gradient is replicated although the state is sharded.

    Gradient parts: `fp32_groups_gradients_flat`, one flat fp32 tensor per parameter group, the same on each rank. Each
    rank clips by the norm of its whole copy and steps on its partition of it: the whole copy is edited.
    """

    sharded = False
    needs: ClassVar[Requires] = _requires(
        "BF16_Optimizer",
        "projecting gradients under DeepSpeed's BF16_Optimizer",
        fp32_groups_gradients_flat="the gradient",
        fp32_groups_has_gradients="whether anything was accumulated",
        **_OF_ALL,
    )

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


class _Offloaded(DeepSpeedGradient):
    """Optimizer offload: the gradient is complete only on the CPU, as `.grad` of each flat fp32 partition.

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
