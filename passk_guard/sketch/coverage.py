"""The trainable parameters of a model, the modules that use them, and the share that a sketch sees.

A parameter that is not sketched is always reported, by name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from passk_guard.sketch.head import head_of
from passk_guard.sketch.layers import Use, kind_of
from passk_guard.sketch.replay import Replay, stages
from passk_guard.utils.errors import GuardError
from passk_guard.utils.private_api import requires
from passk_guard.utils.text import first_of

WARN_BELOW = 0.95
REFUSE_BELOW = 0.8
FORMULA = -1
SHARDED_NEEDS = requires(
    "deepspeed",
    "sharded parameter",
    "any trainer under ZeRO-3",
    "use ZeRO-2",
    ds_shape="the shape of a weight that is empty outside a forward",
)
_NAMED_IN_WARNING = 5


@dataclass(frozen=True)
class Coverage:
    """Share of the trainable parameters whose gradient enters the sketch.

    Attributes:
        covered: number of trainable scalars that are sketched.
        total: number of trainable scalars; a tied weight counts once.
        share: covered / total, in [0, 1].
        uncovered: names of the parameters left out, largest first.
    """

    covered: int
    total: int
    share: float
    uncovered: tuple[str, ...] = ()


@dataclass(frozen=True)
class Holder:
    """A module with trainable parameters of its own.

    Attributes:
        module: the module.
        names: of those parameters.
        stages: the modules that could be replayed for them: itself and those around it.
        level: which of them is; `FORMULA` where none is needed, their number where all have failed.
    """

    module: nn.Module
    names: frozenset[str]
    stages: tuple[nn.Module, ...]
    level: int


@dataclass(frozen=True)
class SketchedParameters:
    """The trainable parameters of a model, and the covered modules that hold them.

    Attributes:
        trainable: ids of the parameters that require grad, to notice when that changes.
        shapes: their names -> shapes, in the order of `named_parameters`; a tied weight occurs once.
        uses: the modules of known kinds that hold them.
        replays: the modules that run again for the others.
        unknown: names that neither holds.
        holders: all modules that hold a trainable parameter of their own.
        head: the module that makes the logits, trainable or not, where its closed form may replace it.
    """

    trainable: frozenset[int]
    shapes: dict[str, tuple[int, ...]]
    uses: tuple[Use, ...]
    replays: tuple[Replay, ...]
    unknown: frozenset[str]
    holders: tuple[Holder, ...]
    head: Use | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Scalars of each trainable parameter."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    def coverage(self, missed: set[str]) -> Coverage:
        """The share that is sketched, when a pass has shown that `missed` is not."""
        sizes = self.sizes
        uncovered = _largest_first((self.unknown | missed) & sizes.keys(), sizes)
        total = sum(sizes.values())
        covered = total - sum(sizes[name] for name in uncovered)
        return Coverage(covered, total, covered / total, tuple(uncovered))


def find_sketched_parameters(model: nn.Module, levels: Mapping[nn.Module, int] | None = None) -> SketchedParameters:
    """The trainable parameters of `model`.

    Args:
        model: any module.
        levels: `Holder.level` of modules for which a pass has refuted the lower ones.

    Raises:
        GuardError: no parameter requires grad.
    """
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise GuardError(
            "Expected a model with trainable parameters; found none that requires grad. Pass the model that is "
            "trained, before anything freezes it (for LoRA: the PEFT model, with its adapter active)."
        )
    # Under ZeRO-3 a weight is empty outside a forward, and `ds_shape` is its shape.
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if p.requires_grad}
    modules, head = dict(model.named_modules()), head_of(model)
    uses: list[Use] = []
    replays: dict[nn.Module, Replay] = {}
    holders = []
    for path, module in modules.items():
        own = {key: p for key, p in module.named_parameters(recurse=False) if p.requires_grad}
        if not own:
            continue
        released = any(hasattr(p, "ds_shape") for p in own.values())
        around = [] if released else stages(path, modules, head)
        weight, bias = (trainable.get(id(own.get(key))) for key in ("weight", "bias"))
        kind = kind_of(module) if weight or bias else None
        level = (levels or {}).get(module, 0 if kind is None else FORMULA)
        names_held = frozenset(trainable[id(p)] for p in own.values())
        holders.append(Holder(module, names_held, tuple(modules[outer] for outer in around), level))
        if 0 <= level < len(around):
            outer = modules[around[level]]
            names = replays.setdefault(outer, Replay(outer)).names
            known = set(names.values())
            inside = path[len(around[level]) :].lstrip(".")
            for key, p in own.items():
                if (name := trainable[id(p)]) not in known:
                    names[f"{inside}.{key}" if inside else key] = name
        elif kind is not None:
            uses.append(Use(module, kind, weight, bias))
    held = {name for use in uses for name in (use.weight, use.bias)}
    held |= {name for replay in replays.values() for name in replay.names.values()}
    unknown = frozenset(shapes.keys() - held)
    return SketchedParameters(
        frozenset(trainable), shapes, tuple(uses), tuple(replays.values()), unknown, tuple(holders), _head(head, uses)
    )


def _head(module: nn.Linear | None, uses: Sequence[Use]) -> Use | None:
    if module is None:
        return None
    return next((use for use in uses if use.module is module), Use(module, "linear", None, None))


def warn_if_low(coverage: Coverage, sizes: Mapping[str, int]) -> None:
    """Emit one UserWarning when less than 95% of the trainable scalars are covered."""
    if coverage.share < WARN_BELOW:
        warnings.warn(
            f"The sketch covers {coverage.share:.1%} of the trainable parameters; inner products of score "
            f"vectors miss the rest. Not covered: {_listed(coverage.uncovered, sizes)}. Covered is what a module "
            "computes that is called on the batch, is not the whole model, and keeps its weights for the backward, "
            "which ZeRO-3 does for linear layers, embeddings and norms only.",
            UserWarning,
            stacklevel=3,
        )


def refuse_if_low(coverage: Coverage, sizes: Mapping[str, int]) -> None:
    """Raise GuardError when less than 80% of the trainable scalars are covered: too few for a cosine."""
    if coverage.share < REFUSE_BELOW:
        raise GuardError(
            f"Expected a sketch of at least {REFUSE_BELOW:.0%} of the trainable parameters; found "
            f"{coverage.share:.1%}. Not covered: {_listed(coverage.uncovered, sizes)}. Switch off kernels that bypass "
            "modules, use ZeRO-2 or FSDP2 in place of ZeRO-3, train adapters on the covered layers, or pass "
            "GuardConfig(instruments='change'), which needs no sketch."
        )


def warn_missed(missed: set[str], sizes: Mapping[str, int]) -> None:
    """Emit one UserWarning that names parameters whose module never took part in a pass."""
    warnings.warn(
        "These trainable parameters were counted as covered, but the pass bypassed their module, called it "
        "on something that is not the batch, or got something else from it than its formula gives: "
        f"{_listed(missed, sizes)}. Their gradient is missing from the sketch, in whole or in part. A fused head or "
        "kernel that reads the weight directly does this, and so does a replaced forward: switch it off for the "
        "guarded model.",
        UserWarning,
        stacklevel=3,
    )


def _largest_first(names: Iterable[str], sizes: Mapping[str, int]) -> list[str]:
    return sorted(names, key=lambda name: (-sizes[name], name))


def _listed(names: Iterable[str], sizes: Mapping[str, int]) -> str:
    return first_of((f"{name} ({sizes[name]:,})" for name in _largest_first(names, sizes)), _NAMED_IN_WARNING)
