"""What all DeepSpeed engines share: the hook before the step, inner products over shards, and one probe backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from passk_guard.mitigation.engines.deepspeed.restore import engine_untouched
from passk_guard.mitigation.engines.protocol import Batch, Parts, local_inner_products
from passk_guard.utils.errors import FailedRefresh, GuardError
from passk_guard.utils.patching import Method, MethodPatch
from passk_guard.utils.private_api import REWEIGHT, Requires, requires

Loss = Callable[[nn.Module, Batch], Tensor]
Take = Callable[[], Sequence[Tensor]]
_RESTORED = "put back after a probe"


class DeepSpeedGradient(ABC):
    """A `GradientEngine` over one `DeepSpeedEngine`.

    DeepSpeed clips, steps and clears the gradient inside `engine.step`, which accelerate calls from within backward:
    by `on_pre_optimizer_step` the gradient is gone. `before_step` therefore runs in a patch of that engine's `step`.
    `step` may be called on every micro-batch; only the last one of a window counts.

    Attributes:
        sharded: whether each rank holds another part of the gradient.
        needs: private names of the optimizer.

    Args:
        engine: a `DeepSpeedEngine` whose optimizer is of the kind that the subclass serves.

    Raises:
        GuardError: the engine or its optimizer lacks an attribute that is read here.
    """

    sharded: ClassVar[bool] = True
    needs: ClassVar[Requires | None] = None
    engine_needs = requires(
        "deepspeed",
        "DeepSpeedEngine",
        "projecting gradients under DeepSpeed",
        REWEIGHT,
        step="the gradient is complete just before it",
        backward="probe gradients",
        module="the model",
        device="where scalars of all ranks are summed",
        is_gradient_accumulation_boundary="the last micro-batch of a step",
        set_gradient_accumulation_boundary="a probe is one accumulation window",
        optimizer="holds the gradient",
        timers=_RESTORED,
        tput_timer=_RESTORED,
    )

    def __init__(self, engine: Any) -> None:
        self.engine_needs.check(engine)
        if self.needs is not None:
            self.needs.check(engine.optimizer)
        self._engine, self._optimizer = engine, engine.optimizer
        self.name = self._describe()
        self._patch: MethodPatch | None = None
        self._inside = False  # whether `before_step` runs

    @abstractmethod
    def _describe(self) -> str:
        """Engine and stage, for messages."""

    @abstractmethod
    def _parts(self) -> list[Tensor]:
        """Aliases of this rank's accumulated gradient."""

    @abstractmethod
    def _at_boundary(self) -> bool:
        """Whether nothing has been accumulated since the last step."""

    @abstractmethod
    def _lend(self) -> AbstractContextManager[Take]:
        """Room for one probe gradient. `take` returns it in separate storage; on exit the engine is as it was."""

    def _clear(self) -> None:
        """Drop what backward accumulated, also where it was interrupted, as after a step."""
        synchronize()
        for parameter in self._engine.module.parameters():
            parameter.grad = None  # by hand: ZeRO-3's zero_grad fails on a CPU when it finds one
        self._optimizer.zero_grad()

    def _back_to_rest(self) -> AbstractContextManager[Any]:
        """After an exception within: what a forward or backward left gathered is sharded again."""
        return nullcontext()

    def _after_edit(self) -> None:  # noqa: B027  most engines derive nothing
        """Bring up to date what the engine derived from the gradient."""

    def install(self, before_step: Callable[[], None]) -> None:
        def make(step: Method) -> Method:
            def stepping(*args: Any, **kwargs: Any) -> Any:
                if self._engine.is_gradient_accumulation_boundary():
                    self._inside = True
                    try:
                        before_step()
                    finally:
                        self._inside = False
                return step(*args, **kwargs)

            return stepping

        self._patch = MethodPatch(self._engine, "step", make, owner="passk_guard.mitigation.engines").install()

    def remove(self) -> None:
        if self._patch is not None:
            self._patch.remove()
            self._patch = None

    def gradient(self) -> list[Tensor]:
        """See `GradientEngine.gradient`.

        Raises:
            GuardError: outside `before_step`, where DeepSpeed holds no gradient, or an old one.
        """
        if not self._inside:
            raise GuardError(
                f"`gradient` of {self.name} was asked for outside `before_step`; DeepSpeed holds no gradient then, or "
                "that of an earlier step. Call it from the function passed to `install`."
            )
        return self._parts()

    def loss_scale(self) -> float:
        return float(getattr(self._optimizer, "loss_scale", 1.0))

    def inner_products(self, pairs: Sequence[tuple[Parts, Parts]]) -> list[float]:
        scalars = local_inner_products(pairs, self._engine.device)
        if self.sharded:
            dist.all_reduce(scalars, group=self._group())
        elif dist.is_initialized():  # equal everywhere already, up to the last bit where the devices differ
            dist.broadcast(scalars, src=0, group=self._group())
        return scalars.tolist()

    @torch.no_grad()
    def add_(self, direction: Parts, coefficient: float) -> None:
        """See `GradientEngine.add_`. In fp16 both `gradient` and what is added are multiplied by `loss_scale`.

        Raises:
            GuardError: outside `before_step`.
        """
        parts = self.gradient()
        if coefficient == 0.0:
            return
        for part, change in zip(parts, direction, strict=True):
            part.add_(change.to(part.device), alpha=coefficient)
        self._after_edit()

    def probe_gradient(self, batches: Sequence[Batch], loss: Loss[Batch], dtype: Any = None) -> list[Tensor]:
        """See `GradientEngine.probe_gradient`. `loss` is given the DeepSpeed engine and forwards through it.

        Raises:
            GuardError: no batches, unequal numbers of them, gradients of training already accumulated, or a loss that
                is no scalar with a gradient.
            FailedRefresh: `loss` failed on another rank, which would otherwise leave this one waiting in backward.
        """
        self._check(len(batches))
        scale = self.loss_scale()
        with self._back_to_rest(), self._lend() as take, engine_untouched(self._engine):
            for index, batch in enumerate(batches):  # one accumulation window, reduced over ranks with its last batch
                self._engine.set_gradient_accumulation_boundary(is_boundary=index == len(batches) - 1)
                self._engine.backward(self._agreed(batch, loss), scale_wrt_gas=False)
            taken = take()
        return [_finished(part, scale, dtype or torch.float32) for part in taken]

    def _agreed(self, batch: Batch, loss: Loss[Batch]) -> Tensor:
        """The loss of one batch, once no rank has failed.

        It goes through the engine: under ZeRO-3 that counts micro-batches in its forward, and a forward through
        `engine.module` would overwrite what the batches before have left.
        """
        try:
            with torch.enable_grad():
                value = loss(self._engine, batch)
            if value.numel() != 1 or not value.requires_grad:
                raise GuardError(
                    "Expected `loss` to return a scalar that depends on the trained parameters; found shape "
                    f"{tuple(value.shape)}, requires_grad={value.requires_grad}."
                )
        except Exception:
            self._on_any_rank(True)
            raise
        if self._on_any_rank(False):
            raise FailedRefresh("the probe loss failed on another rank")
        return value

    def _check(self, count: int) -> None:
        most, least = self._max([count, -count])
        if most != -least or not count:
            raise GuardError(f"Expected equally many probe batches on each rank, at least one; found {count} here.")
        if self._inside or not self._at_boundary():
            raise GuardError(
                f"The probe gradient of {self.name} was asked for with training gradients accumulated, which it would "
                "destroy. Call `probe_gradient` between a step and the next micro-batch (on_step_begin)."
            )

    def _on_any_rank(self, flag: bool) -> bool:
        return bool(self._max([float(flag)])[0])

    def _max(self, values: Sequence[float]) -> list[float]:
        """Largest of each value over the ranks, in one all_reduce."""
        scalars = torch.tensor(values, dtype=torch.float64, device=self._engine.device)
        if dist.is_initialized():
            dist.all_reduce(scalars, op=dist.ReduceOp.MAX, group=self._group())
        return scalars.tolist()

    def _group(self) -> Any:
        """The ranks that share the data; None stands for all, which is what data parallelism alone means."""
        return getattr(self._optimizer, "dp_process_group", None)


def _finished(part: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Unscaled in fp32 before it is rounded to `dtype`."""
    part = part.float()
    return (part if scale == 1.0 else part.div_(scale)).to(dtype)


def synchronize() -> None:
    """Wait for copies to the CPU that were started without waiting for them."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()
