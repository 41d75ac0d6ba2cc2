"""Modules whose parameters no formula covers: their forward runs again for each group, and autograd does the rest.

Fused experts, routers, gated norms and adapters' scales compute with parameters of their own. With the samples of one
group as input, and the gradient of the output from the pass, autograd gives that group's gradient, whatever they
compute. It holds if a sample's output depends on that sample's input alone, which is checked: the second forward of a
group must return what the pass returned. The weights must be there in the backward, so that ZeRO-3, which releases
them, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.func import functional_call

from passk_guard.sketch.accumulator import Accumulator

Keep = Callable[..., Any]


@dataclass
class Replay:
    """A module whose forward is run again.

    Attributes:
        module: a part of the model, one of its `stages`.
        names: path of a trainable parameter in the module -> the name under which it is sketched.
        agreed: whether a second forward has returned what the first one did. A check makes a GPU wait, so one is made.
    """

    module: nn.Module
    names: dict[str, str] = field(default_factory=dict)
    agreed: bool = False


def stages(path: str, modules: Mapping[str, nn.Module], head: nn.Module | None) -> list[str]:
    """Paths of the modules that can be replayed for the parameters of module `path`: itself first, then those around.

    What holds the head or looks up tokens is not among them: the model itself, which would run again as a whole.
    """
    found = []
    while path:
        module = modules[path]
        inside = [inner for name, inner in module.named_modules() if name]
        if head is module or any(inner is head or isinstance(inner, nn.Embedding) for inner in inside):
            break
        if type(module).forward is not nn.Module.forward:  # containers of modules or parameters have none
            found.append(path)
        path = path.rpartition(".")[0]
    return found


class Replays:
    """The replays of one pass.

    Args:
        replays: of the model.
        accumulator: of the batch.
        batch, width: B and T.

    Attributes:
        running: while a module runs again, when no hook of the pass may act.
        seen: names of the parameters that got a gradient.
        missed: names of the parameters of modules whose samples cannot be told apart.
    """

    def __init__(self, replays: Sequence[Replay], accumulator: Accumulator, batch: int, width: int) -> None:
        self._replays, self._accumulator = replays, accumulator
        self._batch, self._width = batch, width
        # Fixed for the pass: checkpointing asks for the same saved tensors in the recomputation. With B = T a
        # sequence-first module looks like a batch-first one, so that an earlier check says nothing.
        self._unchecked = {r.module for r in replays if not r.agreed or batch == width}
        self._new = [r for r in replays if not r.agreed]
        self.running = False
        self.seen: set[str] = set()
        self.missed: set[str] = set()

    def unseen(self) -> set[str]:
        """Names of parameters whose gradient did not arrive. Once it has, none later on means that it is zero."""
        return {name for replay in self._new for name in replay.names.values()} - self.seen | self.missed

    def hooks(self, keep: Keep) -> list[Any]:
        """Install a forward hook on every module; `keep` saves tensors for the backward. Returns the handles."""
        return [
            replay.module.register_forward_hook(partial(self._on_forward, replay, keep), with_kwargs=True)
            for replay in self._replays
        ]

    def _on_forward(self, replay: Replay, keep: Keep, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.running or not torch.is_grad_enabled():  # or the first forward of reentrant checkpointing
            return None
        output = _mapped(self._for_each_sample, output)
        if not any(x.requires_grad for x in _floats(output)):
            output = _mapped(lambda x: x.detach().requires_grad_().clone() if x.is_floating_point() else x, output)
        if not (outputs := _floats(output)):
            return None
        if len(outputs) > 1:  # one may be computed from another, whose gradient would then count twice
            output = _mapped(torch.clone, output)
            outputs = _floats(output)
        inputs, wanted = list(_tensors((args, kwargs))), [x.requires_grad for x in outputs]
        compare = [x.detach().clone() for x in outputs] if module in self._unchecked else []
        node = keep(*(x.detach() for x in inputs), *compare)
        autocast = _autocast_of(outputs[0])

        def on_gradients(gradients: Sequence[Tensor | None]) -> None:
            kept, arrived = node.saved_tensors, iter(gradients)
            first, expected = iter(kept[: len(inputs)]), kept[len(inputs) :]
            call = _mapped(lambda x: next(first), (args, kwargs))
            deltas = [next(arrived) if w else None for w in wanted]
            with self._again(), autocast():
                self._add(replay, call, deltas, expected)

        register_multi_grad_hook([x for x in outputs if x.requires_grad], on_gradients)
        return output

    def _add(self, replay: Replay, call: Any, deltas: Sequence[Tensor | None], expected: Sequence[Tensor]) -> None:
        """Add the gradients of all groups, given the arguments and the gradients of the outputs of the whole batch."""
        groups, names = self._accumulator.layout.groups, list(replay.names.values())
        if not groups:
            self.seen.update(names)
        for number, (_, start, end) in enumerate(groups):
            whole = end - start == self._batch
            part = partial(self._of_samples, start=start, end=end)
            owned = dict(replay.module.named_parameters(remove_duplicate=False))
            leaves = {path: owned[path].detach().requires_grad_() for path in replay.names}
            checks = number == 0 and len(expected) > 0 and not whole
            try:
                with torch.enable_grad():
                    outputs = _forward(replay.module, leaves, *_mapped(part, call))
                    outputs = [y if x is None else y.expand_as(part(x)) for x, y in zip(deltas, outputs, strict=True)]
            except torch.OutOfMemoryError:
                raise
            except Exception:
                if not checks:
                    raise
                outputs = []  # it does not take a part of the batch
            used = [i for i, x in enumerate(deltas) if x is not None]
            if not whole and not all(self._is_apart(x, least=3) for x in deltas if x is not None):
                outputs = []
            if len(outputs) != len(deltas) or (checks and not all(_agree(outputs[i], part(expected[i])) for i in used)):
                self.missed.update(names)
                return
            replay.agreed |= checks
            pairs = [(outputs[i], part(x)) for i, x in enumerate(deltas) if x is not None and outputs[i].requires_grad]
            if not pairs:
                continue
            found = _gradients(pairs, list(leaves.values()))
            with torch.no_grad(), torch.autocast(pairs[0][0].device.type, enabled=False):
                for name, gradient in zip(names, found, strict=True):
                    if gradient is not None:
                        self.seen.add(name)
                        self._accumulator.add_gradient(name, number, gradient)

    def _for_each_sample(self, x: Tensor) -> Tensor:
        """Positions are looked up once for the whole batch; repeat them, so that gradients stay per sample."""
        if x.is_floating_point() and x.dim() == 3 and x.shape[:2] == (1, self._width):
            return x.expand(self._batch, -1, -1)
        return x

    def _is_apart(self, x: Tensor, least: int = 1) -> bool:
        """Whether x is [B, ...] or [B T, ...]. An output [B, d] may be B tokens of any samples: it takes three."""
        by_sample = x.dim() >= least and x.shape[0] == self._batch
        return x.dim() > 0 and (by_sample or x.shape[0] == self._batch * self._width)

    def _of_samples(self, x: Tensor, *, start: int, end: int) -> Tensor:
        """Samples start..end-1 of x [B, ...] or [B T, ...]. What has another first dimension is shared by all."""
        if end - start == self._batch or not self._is_apart(x):
            return x
        tokens = x.shape[0] // self._batch
        return x[start * tokens : end * tokens]

    @contextmanager
    def _again(self) -> Iterator[None]:
        self.running = True
        try:
            yield
        finally:
            self.running = False


def _forward(module: nn.Module, leaves: Mapping[str, Tensor], args: Any, kwargs: Any) -> list[Tensor]:
    """The floating point outputs of the module, with `leaves` in place of its parameters."""
    replaced = {f"of.{path}": leaf for path, leaf in leaves.items()}
    return _floats(functional_call(_Forward(module), replaced, args, kwargs))


class _Forward(nn.Module):
    """Calls the forward of a module without its hooks, checkpointing and engine around it."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.of.forward(*args, **kwargs)


def _gradients(pairs: Sequence[tuple[Tensor, Tensor]], leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    outputs, deltas = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, leaves, deltas, allow_unused=True)


def _agree(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    # A model in float64 may compute in float32 inside.
    tolerance = max(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    return bool((found.detach() - expected).norm() <= tolerance * expected.norm())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _floats(value: Any) -> list[Tensor]:
    return [x for x in _tensors(value) if x.is_floating_point()]


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with its tensors changed, in the order of `_tensors`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        items = [_mapped(change, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        named = {key: _mapped(change, item) for key, item in value.items()}
        return named if type(value) is dict else type(value)(**named)
    return value


def _autocast_of(like: Tensor) -> Callable[[], Any]:
    """The autocast in force now, to be entered again in the backward."""
    kind = like.device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
