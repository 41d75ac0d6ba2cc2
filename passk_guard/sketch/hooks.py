"""Hooks on the covered modules: keep a factor of the input, and join it with the gradient of the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from passk_guard.sketch.accumulator import Accumulator
from passk_guard.sketch.layers import CONTRIBUTIONS, Use, by_sample, formula_holds, is_close
from passk_guard.sketch.replay import Replay, Replays


class _Keep(torch.autograd.Function):
    """Saves tensors for the backward with autograd.

    Non-reentrant checkpointing then drops and recomputes them like any other activation, and autograd
    notices when one of them is overwritten in place before the backward.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("Nothing is computed from this node.")


def _keep(*kept: Tensor) -> Any:
    with torch.enable_grad():
        return _Keep.apply(torch.zeros((), requires_grad=True), *kept).grad_fn


class Tap:
    """The hooks of one pass, and their observations.

    Attributes:
        checked: whether the formula of a module held when it was first called. Shared by all passes, since a check
            makes a GPU wait.
        seen: positions in `uses` of the modules whose output gradient arrived.
        missed: names of parameters whose module was called on something that is not the batch.
    """

    def __init__(
        self,
        uses: Sequence[Use],
        replays: Sequence[Replay],
        accumulator: Accumulator,
        batch: int,
        width: int,
        checked: dict[nn.Module, bool],
    ) -> None:
        self.uses, self.accumulator, self.checked = uses, accumulator, checked
        self.replays = Replays(replays, accumulator, batch, width)
        self.batch, self.width = batch, width
        self.seen: set[int] = set()
        self.missed: set[str] = set()
        self._looked_up: dict[int, Tensor] = {}

    def unseen(self) -> set[str]:
        """Names of parameters to which at least one covered module contributed nothing in this pass."""
        silent = {name for i, use in enumerate(self.uses) if i not in self.seen for name in _names(use)}
        return silent | self.missed | self.replays.unseen()

    def check(self, index: int, x: Tensor, output: Tensor) -> None:
        """Compare the output of a module with its formula, once, while its weights are gathered."""
        use = self.uses[index]
        if use.module in self.checked or (holds := formula_holds(use, x, output)) is None:
            return
        self.checked[use.module] = holds
        if use.kind == "embedding":
            self._looked_up[index] = output.clone()

    def check_unchanged(self, index: int, output: Tensor) -> None:
        """Compare what the hooks of an embedding made of its output with the output that was checked."""
        if (before := self._looked_up.pop(index, None)) is not None and not is_close(output, before):
            self.checked[self.uses[index].module] = False

    def on_forward(self, index: int, x: Tensor, output: Tensor) -> None:
        """Keep the factor that comes from the input until the gradient of the output arrives."""
        use = self.uses[index]
        contribution = CONTRIBUTIONS[use.kind](use, self.accumulator)
        rows = x[..., None] if use.kind == "embedding" else x
        factor = by_sample(rows.expand(*output.shape[:-1], -1), self.batch, self.width)
        if factor is None or not self.checked.get(use.module, True):
            # Nothing is missed unless a gradient arrives (for DoRA's norms none does).
            output.register_hook(lambda grad: self.missed.update(_names(use)))
            return
        node = _keep(*contribution.keep(factor))

        def on_gradient(grad: Tensor) -> None:
            with _plain_arithmetic(grad):
                delta = by_sample(grad, self.batch, self.width)
                assert delta is not None  # it has the shape of the output
                contribution.add(delta, node.saved_tensors)
            self.seen.add(index)

        output.register_hook(on_gradient)


@contextmanager
def _plain_arithmetic(like: Tensor) -> Iterator[None]:
    """Switch off autograd, and an autocast around the model."""
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        yield


def _names(use: Use) -> set[str]:
    return {name for name in (use.weight, use.bias) if name is not None}


@contextmanager
def tapped(model: nn.Module, tap: Tap, besides: nn.Module | None = None) -> Iterator[None]:
    """Install the hooks of `tap` on `model` but not on `besides`, and remove them on the way out."""

    def enter(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return _into_graph(_per_row(_input(args, kwargs), output, tap.batch, tap.width))

    def check(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            with torch.no_grad():
                if not tap.replays.running:
                    tap.check(index, _input(args, kwargs), output)

        return hook

    def listen(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            # The first forward of reentrant checkpointing, or a module that runs again.
            if not torch.is_grad_enabled() or tap.replays.running:
                return None
            output = _into_graph(output)
            with _plain_arithmetic(output):
                tap.check_unchanged(index, output)
                tap.on_forward(index, _input(args, kwargs).detach(), output)
            return output

        return hook

    handles = []
    try:
        for module in model.modules():
            # Every embedding, trainable or not: reentrant checkpointing needs inputs that require grad.
            if isinstance(module, nn.Embedding):
                handles.append(module.register_forward_hook(enter, with_kwargs=True))
        for index, use in enumerate(tap.uses):
            if use.module is besides:
                tap.seen.add(index)
                continue
            # Before all others: the output is the module's own then, and sharded engines have not released the weight.
            # Embeddings begin the graph, and enter it last: an engine would gather their weight for a backward.
            first = not isinstance(use.module, nn.Embedding)
            handles.append(use.module.register_forward_hook(listen(index), with_kwargs=True, prepend=first))
            handles.append(use.module.register_forward_hook(check(index), with_kwargs=True, prepend=True))
        handles += tap.replays.hooks(_keep)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _per_row(ids: Tensor, output: Tensor, batch: int, width: int) -> Tensor:
    """Positions are looked up once for the whole batch; repeat them, so that gradients stay per sample."""
    if batch > 1 and ids.shape in ((1, width), (width,)):
        return output.expand(batch, width, -1)
    return output


def _into_graph(output: Tensor) -> Tensor:
    """A tensor of the same values that requires grad.

    A copy, since models may write into it, which a leaf that requires grad does not allow.
    """
    if output.requires_grad and not output.is_leaf:
        return output
    if not torch.is_grad_enabled():
        return output
    return output.detach().requires_grad_().clone()
