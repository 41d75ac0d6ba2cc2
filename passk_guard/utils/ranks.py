"""Agreement between the ranks of a run. In a single process every method is the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.text import describe_error

T = TypeVar("T")


def is_sharded(model: nn.Module) -> bool:
    """Whether parts of the model are on several ranks (ZeRO-3, FSDP2), so that all of them make every pass."""
    return any(hasattr(p, "ds_shape") or type(p.data) is not Tensor for p in model.parameters())


class Ranks:
    """The processes of a run.

    Args:
        device: where collectives take their tensors from (NCCL: this rank's GPU).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.index = dist.get_rank() if self._many else 0
        self.count = dist.get_world_size() if self._many else 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over ranks, the same bits on each, on the device and in the dtype of `tensor`."""
        if not self._many:
            return tensor
        moved = tensor.to(self.device, copy=True)
        dist.all_reduce(moved)
        return moved.to(tensor.device)

    def max(self, value: int) -> int:
        """Largest of the ranks' values."""
        if not self._many:
            return value
        moved = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(moved, op=dist.ReduceOp.MAX)
        return int(moved)

    def from_first(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor on every rank; the others pass one of the same shape and dtype."""
        if not self._many:
            return tensor
        moved = tensor.to(self.device, copy=True)
        dist.broadcast(moved, src=0)
        return moved.to(tensor.device)

    def together(self, stage: Callable[[], T]) -> T:
        """Run `stage`; when it fails on any rank, it fails on all of them with the same reason.

        A rank that raised would otherwise leave the others waiting in their next collective for ever.

        Raises:
            FailedRefresh: with the reason of the first rank that failed.
        """
        reason: str | None = None
        cause: Exception | None = None
        result: T | None = None
        try:
            result = stage()
        except FailedRefresh as error:
            reason, cause = str(error), error
        except Exception as error:  # whatever it was, training goes on
            reason, cause = describe_error(error), error
        if self._many and self.max(int(reason is not None)):
            reasons: list[str | None] = [None] * self.count
            dist.all_gather_object(reasons, reason)
            failed, first = next((rank, text) for rank, text in enumerate(reasons) if text is not None)
            reason = first if first.startswith("rank ") else f"rank {failed}: {first}"  # agreed on within the stage
        if reason is not None:
            try:
                raise FailedRefresh(reason) from cause
            finally:
                del cause  # in a cycle with its traceback, the tensors of the stage would wait for the collector
        return result  # type: ignore[return-value]
