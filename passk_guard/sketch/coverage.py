"""The trainable parameters of a model, the modules that use them, and the share that a sketch sees.

A parameter that is not sketched is always reported, by name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from passk_guard.sketch.head import head_of
from passk_guard.sketch.layers import Use, find_uses
from passk_guard.utils.errors import GuardError
from passk_guard.utils.private_api import requires
from passk_guard.utils.text import first_of

WARN_BELOW = 0.95
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
class SketchedParameters:
    """The trainable parameters of a model, and the covered modules that hold them.

    Attributes:
        trainable: ids of the parameters that require grad, to notice when that changes.
        shapes: their names -> shapes, in the order of `named_parameters`; a tied weight occurs once.
        uses: the covered modules that hold them.
        unknown: names that no covered module holds.
        head: the module that makes the logits, trainable or not, where its closed form may replace it.
    """

    trainable: frozenset[int]
    shapes: dict[str, tuple[int, ...]]
    uses: tuple[Use, ...]
    unknown: frozenset[str]
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


def find_sketched_parameters(model: nn.Module) -> SketchedParameters:
    """The trainable parameters of `model`.

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
    uses = tuple(find_uses(model, trainable))
    held = {name for use in uses for name in (use.weight, use.bias)}
    return SketchedParameters(frozenset(trainable), shapes, uses, frozenset(shapes.keys() - held), _head(model, uses))


def _head(model: nn.Module, uses: tuple[Use, ...]) -> Use | None:
    if (module := head_of(model)) is None:
        return None
    return next((use for use in uses if use.module is module), Use(module, "linear", None, None))


def warn_if_low(coverage: Coverage, sizes: Mapping[str, int]) -> None:
    """Emit one UserWarning when less than 95% of the trainable scalars are covered."""
    if coverage.share < WARN_BELOW:
        warnings.warn(
            f"The sketch covers {coverage.share:.1%} of the trainable parameters; inner products of score "
            f"vectors miss the rest. Not covered: {_listed(coverage.uncovered, sizes)}. Covered are nn.Linear, "
            "Conv1D, nn.Embedding, LayerNorm and RMSNorm, each called as a module.",
            UserWarning,
            stacklevel=3,
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
