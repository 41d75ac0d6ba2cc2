"""Leave training exactly as it was found: a probe may read everything and change nothing.

`untouched` surrounds a whole refresh, `sampling_mode` the sampling of completions, and `frozen_pass` and
`without_dropout` the passes of the model. `random_state` puts back the random state for all of them.
"""

from __future__ import annotations

import copy
import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from passk_guard.utils.private_api import OBSERVE, requires

logger = logging.getLogger(__name__)

Restore = Callable[[], None]
_CHECKPOINT = "_gradient_checkpointing_func"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MODULE_NEEDS = requires(
    "torch", "Module", "any trainer and engine", OBSERVE, **dict.fromkeys(_HOOKS, "counted, to find hooks left behind")
)
TENSOR_NEEDS = requires(
    "torch", "Tensor", "any trainer and engine", OBSERVE, _version="finds gradients that a probe wrote into"
)
LAYER_NEEDS = requires(
    "transformers",
    "GradientCheckpointingLayer",
    "any trainer of a model that checkpoints activations",
    "set gradient_checkpointing=False",
    _gradient_checkpointing_func="checkpoints a probe's activations without dropout",
)


def check_model(model: nn.Module) -> None:
    """Raise GuardError where torch or transformers lacks a private name that is used here."""
    MODULE_NEEDS.check(model)
    TENSOR_NEEDS.check(torch.Tensor)
    for module in model.modules():
        named = (kind.__name__ == LAYER_NEEDS.owner for kind in type(module).__mro__)
        if getattr(module, "gradient_checkpointing", False) and any(named):
            LAYER_NEEDS.check(module)


@contextmanager
def untouched(model: nn.Module, tokenizer: Any = None) -> Iterator[None]:
    """Put back on exit, also after an exception, whatever the body changed of the run's state.

    Restored: the random state of `random`, numpy, torch and the accelerator; train/eval mode of every module;
    requires_grad and the identity of .grad of every parameter; generation_config, config.use_cache and the
    gradient checkpointing flags of every submodule; the tokenizer's padding and truncation side; grad mode and
    determinism flags of torch. No tensor but the random states is copied.

    What cannot be put back without a copy is reported as a warning in the log: gradients written in place, and
    hooks left behind on modules.

    Args:
        model: the trained model, wrapped or not.
        tokenizer: a tokenizer, or a processor that holds one.
    """
    modules = list(model.modules())
    with ExitStack() as stack:  # a restoration that fails does not keep the others from running
        stack.enter_context(random_state())
        stack.callback(_torch_flags())
        stack.callback(_hook_count(modules))
        stack.callback(_parameters(list(model.parameters())))
        stack.callback(_attributes(modules, ("training", "gradient_checkpointing", _CHECKPOINT)))
        stack.callback(_attributes(_configs(modules), ("use_cache",)))
        stack.callback(_generation_configs(modules))
        stack.callback(_attributes([getattr(tokenizer, "tokenizer", tokenizer)], ("padding_side", "truncation_side")))
        yield


@contextmanager
def random_state() -> Iterator[None]:
    """Put the random generators back on exit: `random`, numpy once imported, torch on CPU, the accelerator in use."""
    numpy: Any = sys.modules.get("numpy")
    device: Any = _accelerator()
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        if numpy is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        if device is not None:
            every = "_all" if hasattr(device, "get_rng_state_all") else ""
            stack.callback(getattr(device, f"set_rng_state{every}"), getattr(device, f"get_rng_state{every}")())
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the body on random generators seeded with `seed`, and put their former states back afterwards."""
    with random_state():
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed % 2**32)
        # Not torch.manual_seed: that also queues the seed for devices that training has not initialised yet.
        torch.default_generator.manual_seed(seed)
        if (device := _accelerator()) is not None:
            getattr(device, "manual_seed_all", device.manual_seed)(seed)
        yield


@contextmanager
def sampling_mode(model: nn.Module, seed: int) -> Iterator[None]:
    """No dropout, no gradient, no checkpointing, and the random generators on `seed`; all put back on exit.

    Checkpointing is switched by its flag and not by transformers' enable and disable, of which each pair leaves one
    more hook on the input embedding.
    """
    names, modules = ("training", "gradient_checkpointing"), list(model.modules())
    with ExitStack() as stack:
        stack.callback(_attributes(modules, names))
        for module in modules:
            for name in vars(module).keys() & set(names):
                setattr(module, name, False)
        stack.enter_context(seeded(seed))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def frozen_pass(model: nn.Module) -> Iterator[None]:
    """Freeze all weights and switch dropout off; requires_grad, flags and the random state are put back on exit."""
    # With no weight requiring grad, autograd never forms a weight gradient: that is where the time goes.
    trainable = [p for p in model.parameters() if p.requires_grad]
    with random_state(), without_dropout(model):
        try:
            for p in trainable:
                p.requires_grad_(False)
            yield
        finally:
            for p in trainable:
                p.requires_grad_(True)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in every module, but for the flags that make Hugging Face models checkpoint activations.

    A layer that checkpoints itself in train mode would apply its functional dropout, in the forward and again in the
    recomputation: what it checkpoints runs in eval mode, and dropout written as plain numbers on it is set to zero.
    Every flag and rate is put back on exit, also after an exception.
    """
    modules = list(model.modules())
    with ExitStack() as stack:
        stack.callback(_attributes(modules, ("training",)))
        for module in modules:
            drives = module.training and bool(getattr(module, "gradient_checkpointing", False))
            module.training = drives  # Hugging Face models checkpoint in train mode only
            if not drives:
                continue
            numbers = [name for name, value in vars(module).items() if isinstance(value, float)]
            rates = [name for name in numbers if "dropout" in name or "layerdrop" in name]
            stack.callback(_attributes([module], (*rates, _CHECKPOINT)))
            vars(module).update(dict.fromkeys(rates, 0.0))
            if (checkpoint := vars(module).get(_CHECKPOINT)) is not None:
                vars(module)[_CHECKPOINT] = _checkpoint_in_eval(module, checkpoint)
        yield


def _checkpoint_in_eval(module: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def in_eval(*inputs: Any, **options: Any) -> Any:
            training, module.training = module.training, False
            try:
                return forward(*inputs, **options)
            finally:
                module.training = training

        return checkpoint(in_eval, *args, **kwargs)

    return checkpointed


@contextmanager
def attributes(obj: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes of `obj` for the duration of the body; those it does not have are left out."""
    before = {name: getattr(obj, name) for name in values if hasattr(obj, name)}
    try:
        for name in before:
            setattr(obj, name, values[name])
        yield
    finally:
        for name, value in before.items():
            setattr(obj, name, value)


def _accelerator() -> ModuleType | None:
    """torch.cuda, torch.xpu, torch.mps, ... when such a device is in use; asking does not initialise it."""
    if not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    module: Any = None if accelerator is None else torch.get_device_module(accelerator)
    in_use = module is not None and getattr(module, "is_initialized", lambda: True)()
    return module if in_use else None


def _torch_flags() -> Restore:
    def deterministic() -> tuple[bool, bool]:
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.are_deterministic_algorithms_enabled(), warn_only

    grad, before = torch.is_grad_enabled(), deterministic()
    cudnn = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)

    def restore() -> None:
        torch.set_grad_enabled(grad)
        if before != deterministic():  # setting it imports the compiler
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn

    return restore


def _attributes(objects: Sequence[Any], names: tuple[str, ...]) -> Restore:
    """Each object's own attributes of these names; one it lacks now is taken off it again."""
    missing = object()
    before = [(obj, name, vars(obj).get(name, missing)) for obj in objects if obj is not None for name in names]

    def restore() -> None:
        for obj, name, value in before:
            if vars(obj).get(name, missing) is value:
                continue
            if value is missing:
                delattr(obj, name)
            else:
                setattr(obj, name, value)

    return restore


def _parameters(parameters: list[nn.Parameter]) -> Restore:
    before = [(p, p.requires_grad, p.grad, _version(p.grad)) for p in parameters]

    def restore() -> None:
        written = 0
        for parameter, requires_grad, grad, version in before:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad
            written += _version(grad) != version
        if written:
            logger.warning(
                "passk_guard: the probe wrote into the gradients of %d parameters. They cannot be put back; "
                "please report this with the engine in use.",
                written,
            )

    return restore


def _version(grad: Tensor | None) -> int:
    return 0 if grad is None else grad._version


def _configs(modules: list[nn.Module]) -> list[Any]:
    """Every model config met, text configs of multimodal ones included, each once."""
    configs: list[Any] = [vars(module).get("config") for module in modules]
    texts = [c.get_text_config() for c in configs if hasattr(c, "get_text_config")]
    return list({id(c): c for c in [*configs, *texts] if hasattr(c, "use_cache")}.values())


def _generation_configs(modules: list[nn.Module]) -> Restore:
    holders = [(m, m.generation_config) for m in modules if vars(m).get("generation_config") is not None]
    before = [(module, config, copy.deepcopy(vars(config))) for module, config in holders]

    def restore() -> None:
        for module, config, contents in before:
            module.generation_config = config
            if vars(config) != contents:
                vars(config).clear()
                vars(config).update(contents)

    return restore


def _hook_count(modules: list[nn.Module]) -> Restore:
    def count() -> int:
        return sum(len(getattr(module, hooks)) for module in modules for hooks in _HOOKS)

    before = count()

    def check() -> None:
        # Counted and not removed: DeepSpeed's ZeRO-3 takes its own hooks off and on again during generation.
        if (after := count()) != before:
            logger.warning("passk_guard: hooks on the model went from %d to %d in the probe.", before, after)

    return check
