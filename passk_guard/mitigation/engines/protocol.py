"""`GradientEngine`: the training gradient before the optimizer step, whatever engine holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

Batch = TypeVar("Batch")
Parts = Sequence[Tensor]
"""This rank's share of a vector in parameter space: tensors in a fixed order, the same on every call. Parts of two
vectors have the same shapes; a sharded engine holds different parts on each rank, a replicated one the same."""


class GradientEngine(Protocol):
    """One engine of one trainer.

    `install` sets a hook that runs when the gradient of a step is complete: summed over micro-batches, averaged over
    ranks, not yet clipped, not yet seen by the optimizer. In the hook, `gradient` is this rank's share, editable in
    place. `remove` leaves no trace. Everything is collective: all ranks call the same methods in the same order.
    """

    name: str

    def install(self, before_step: Callable[[], None]) -> None:
        """Call `before_step` once before each optimizer step, on every rank. Raises GuardError when installed."""
        ...

    def remove(self) -> None:
        """Take the hook out; does nothing when there is none."""
        ...

    def gradient(self) -> list[Tensor]:
        """This rank's share of the accumulated gradient times `loss_scale`: aliases, to be written to through `add_`.

        Only inside `before_step`. A parameter that no loss reached counts as zero.
        """
        ...

    def loss_scale(self) -> float:
        """What `gradient` is multiplied by (fp16); 1.0 otherwise."""
        ...

    def inner_products(self, pairs: Sequence[tuple[Parts, Parts]]) -> list[float]:
        """Global inner products of pairs of vectors, accumulated in float64, all in one all_reduce of scalars.

        The same numbers on every rank, to the last bit: ranks decide by them.
        """
        ...

    def add_(self, direction: Parts, coefficient: float) -> None:
        """gradient += coefficient * direction in place, with whatever the engine derived from the gradient.

        The gradient is that of `gradient`, loss scale included. Coefficient 0 changes no bit.
        """
        ...

    def probe_gradient(
        self, batches: Sequence[Batch], loss: Callable[[nn.Module, Batch], Tensor], dtype: Any = None
    ) -> list[Tensor]:
        """This rank's share of the gradient of sum over batches of loss(model, batch), averaged over ranks.

        Runs at a step boundary only, and leaves no trace in the engine: `.grad`, buffers, counters and accumulation
        flags are as before. Every rank passes equally many batches. Not multiplied by any loss scale.

        Args:
            batches: at least one.
            loss: scalar loss of one batch, given the module to forward through.
            dtype: of the result, fp32 by default, or bf16 to halve its memory.

        Raises:
            Whatever `loss` raises, after the same cleaning up.
            FailedRefresh: where `loss` went well but not on another rank. An engine that communicates in the forward
                pass (sharded weights) cannot know: there `loss` must raise on all ranks or on none.
        """
        ...
