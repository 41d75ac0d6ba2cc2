"""The base of engines whose gradients lie in `.grad`, complete when `accelerator.backward` returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passk_guard.mitigation.engines.protocol import Parts, local_inner_products
from passk_guard.utils.patching import Method, MethodPatch
from passk_guard.utils.private_api import REWEIGHT, requires


class BackwardEngine:
    """Gradients in `.grad`, in the order of `model.parameters()`, of those that require one at construction.

    The Trainer calls `accelerator.backward` once a micro-batch and clips after the last one; `before_step` runs in
    between. A parameter without a gradient (None: no loss reached it) counts as zero.

    Args:
        trainer: a transformers Trainer whose train() has begun.
        model: holds the trained parameters, tied ones once.
        name: see `GradientEngine`.
    """

    accelerator_needs = requires(
        "accelerate",
        "Accelerator",
        "projecting gradients on any engine but DeepSpeed",
        REWEIGHT,
        has_lomo_optimizer="finds optimizers inside the backward pass",
        scaler="its scale is in every gradient of fp16",
    )

    def __init__(self, trainer: Any, model: nn.Module, name: str) -> None:
        self.accelerator_needs.check(trainer.accelerator)
        self.name = name
        self._accelerator = trainer.accelerator
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._patch: MethodPatch | None = None

    def install(self, before_step: Callable[[], None]) -> None:
        """See `GradientEngine.install`; the hook is a patch of this accelerator's `backward`."""
        accelerator = self._accelerator

        def make_wrapper(backward: Method) -> Method:
            def backward_then_edit(*args: Any, **kwargs: Any) -> Any:
                result = backward(*args, **kwargs)
                if accelerator.sync_gradients:  # the last micro-batch of the step
                    before_step()
                return result

            return backward_then_edit

        patch = MethodPatch(accelerator, "backward", make_wrapper, owner="passk_guard.mitigation.engines")
        self._patch = patch.install()

    def remove(self) -> None:
        if self._patch is not None:
            self._patch.remove()
            self._patch = None

    def gradient(self) -> list[Tensor]:
        """See `GradientEngine.gradient`. Zeros stand for a missing gradient; only `add_` can create one."""
        return [self._local(torch.zeros_like(p) if p.grad is None else p.grad) for p in self._parameters]

    def loss_scale(self) -> float:
        """See `GradientEngine.loss_scale`; the scale of the accelerator's GradScaler, where there is one."""
        scaler = self._accelerator.scaler
        return 1.0 if scaler is None or not scaler.is_enabled() else float(scaler.get_scale())

    def inner_products(self, pairs: Sequence[tuple[Parts, Parts]]) -> list[float]:
        return self._over_ranks(local_inner_products(pairs, self._accelerator.device)).tolist()

    def add_(self, direction: Parts, coefficient: float) -> None:
        """See `GradientEngine.add_`.

        A missing gradient is created where `direction` is not zero, and stays missing elsewhere: the optimizer decays
        the weights of every parameter that has one.
        """
        if coefficient == 0.0:
            return
        missing = [(p, part) for p, part in zip(self._parameters, direction, strict=True) if p.grad is None]
        norms = self.inner_products([([part], [part]) for _, part in missing]) if missing else []
        for (parameter, _), norm in zip(missing, norms, strict=True):
            if norm != 0.0:
                parameter.grad = torch.zeros_like(parameter)
        for gradient, part in zip(self.gradient(), direction, strict=True):
            gradient.add_(part, alpha=coefficient)

    def _local(self, tensor: Tensor) -> Tensor:
        """The part of `tensor` that this rank holds, as an alias."""
        return tensor

    def _over_ranks(self, scalars: Tensor) -> Tensor:
        """Global inner products from what each rank has."""
        return scalars
