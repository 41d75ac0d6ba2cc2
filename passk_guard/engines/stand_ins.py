"""A second set of leaf parameters over the same memory, so that a backward pass meets nothing of the training's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def stand_ins(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Put new leaves in the place of `parameters` throughout `model`, and take them out again on exit.

    A stand-in shares the memory of its parameter and has a `.grad` of its own. Whatever hangs on the parameter's
    accumulation node stays asleep: DistributedDataParallel's reducer (with `static_graph` a single backward past it,
    before its first step, leaves the ranks with different weights and no error), and hooks that run an optimizer as
    soon as a gradient is there. Plain tensor hooks, which change a gradient on its way, are taken along.

    Args:
        model: not wrapped; may use one parameter in several places.
        parameters: leaves of it.

    Yields:
        The stand-ins, in the order of `parameters`.
    """
    twins = {id(parameter): _twin(parameter) for parameter in parameters}
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in twins
    ]
    try:
        for module, name, parameter in places:
            module._parameters[name] = twins[id(parameter)]
        yield [twins[id(parameter)] for parameter in parameters]
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def _twin(parameter: nn.Parameter) -> nn.Parameter:
    twin = nn.Parameter(parameter.detach())
    vars(twin).update(vars(parameter))  # marks such as `_is_hf_initialized`
    for hook in (parameter._backward_hooks or {}).values():
        twin.register_hook(hook)
    return twin
