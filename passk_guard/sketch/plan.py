"""What a model offers to the sketch: its trainable parameters, and the modules that use them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from passk_guard.sketch.coverage import Coverage, measure_coverage
from passk_guard.sketch.head import head_of
from passk_guard.sketch.layers import Use, find_uses
from passk_guard.utils.errors import GuardError


@dataclass(frozen=True)
class Plan:
    """The trainable parameters of a model, as found.

    Attributes:
        trainable: ids of the parameters that require grad, to notice when that changes.
        shapes: their names -> shapes, in the order of `named_parameters`; a tied weight occurs once.
        uses: the covered modules that hold them.
        unknown: names that no covered module holds.
        head: the module that makes the logits, trainable or not, where its closed form may stand in for it.
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
        return measure_coverage(self.sizes, self.unknown | missed)


def make_plan(model: nn.Module) -> Plan:
    """Look through `model`.

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
    return Plan(frozenset(trainable), shapes, uses, frozenset(shapes.keys() - held), _head(model, uses))


def _head(model: nn.Module, uses: tuple[Use, ...]) -> Use | None:
    if (module := head_of(model)) is None:
        return None
    return next((use for use in uses if use.module is module), Use(module, "linear", None, None))


def trainable_ids(model: nn.Module) -> frozenset[int]:
    """Ids of the parameters that require grad."""
    return frozenset(id(p) for p in model.parameters() if p.requires_grad)
