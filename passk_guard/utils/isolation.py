"""Leaving training exactly as it was found: a probe may read everything and change nothing."""

from __future__ import annotations

import copy
import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from passk_guard.utils.private_api import check, seams

logger = logging.getLogger(__name__)

Restore = Callable[[], None]
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


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
    with ExitStack() as stack:
        for restore in _snapshots(model, tokenizer):
            stack.callback(restore)  # one that fails does not keep the others from running
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the body on random generators seeded with `seed`, and put their former states back afterwards.

    Covers `random`, numpy (once imported), torch on CPU and every initialised accelerator device.
    """
    restore = _random_state()
    try:
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed % 2**32)
        # Not torch.manual_seed: that also queues the seed for devices that training has not initialised yet.
        torch.default_generator.manual_seed(seed)
        if (device := _accelerator()) is not None:
            getattr(device, "manual_seed_all", device.manual_seed)(seed)
        yield
    finally:
        restore()


def _snapshots(model: nn.Module, tokenizer: Any) -> Iterator[Restore]:
    modules = list(model.modules())
    yield _random_state()
    yield _torch_flags()
    yield _hook_count(modules)
    yield _parameters(list(model.parameters()))
    yield _attributes(modules, ("training", "gradient_checkpointing", "_gradient_checkpointing_func"))
    yield _attributes(_configs(modules), ("use_cache",))
    yield _generation_configs(modules)
    yield _attributes([getattr(tokenizer, "tokenizer", tokenizer)], ("padding_side", "truncation_side"))


def _random_state() -> Restore:
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy: Any = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    device: Any = _accelerator()
    many = hasattr(device, "get_rng_state_all")
    device_state = None if device is None else device.get_rng_state_all() if many else device.get_rng_state()

    def restore() -> None:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        if device is not None:
            (device.set_rng_state_all if many else device.set_rng_state)(device_state)

    return restore


def _accelerator() -> ModuleType | None:
    """torch.cuda, torch.xpu, torch.mps, ... when such a device is in use; looking does not initialise it."""
    if not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    module: Any = None if accelerator is None else torch.get_device_module(accelerator)
    in_use = module is not None and getattr(module, "is_initialized", lambda: True)()
    return module if in_use else None


def _torch_flags() -> Restore:
    grad = torch.is_grad_enabled()
    deterministic, warn_only = _deterministic()
    cudnn = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)

    def restore() -> None:
        torch.set_grad_enabled(grad)
        if (deterministic, warn_only) != _deterministic():  # setting it imports the compiler
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn

    return restore


def _deterministic() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _attributes(objects: list[Any], names: tuple[str, ...]) -> Restore:
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


# A forward pass without dropout, which still checkpoints its activations as training does.


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in every module, but for the flags that make Hugging Face models checkpoint activations.

    Every flag and rate is put back on the way out, also after an exception.
    """
    flags = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        try:
            for module, training in flags:
                drives = training and bool(getattr(module, "gradient_checkpointing", False))
                module.training = drives  # Hugging Face models checkpoint in train mode only
                if drives:
                    stack.enter_context(_checkpointing_in_eval(module))
            yield
        finally:
            for module, training in flags:
                module.training = training


@contextmanager
def _checkpointing_in_eval(module: nn.Module) -> Iterator[None]:
    """Let `module` checkpoint as in training, while what it checkpoints runs in eval mode.

    A layer that drives its own checkpointing would otherwise apply its functional dropout, in the forward and
    again in the recomputation. Dropout written as plain numbers on the module is zeroed for the same reason.
    """
    rates = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, float) and ("dropout" in name or "layerdrop" in name)
    }
    checkpoint = vars(module).get("_gradient_checkpointing_func")
    vars(module).update(dict.fromkeys(rates, 0.0))
    if checkpoint is not None:
        vars(module)["_gradient_checkpointing_func"] = _checkpoint_in_eval(module, checkpoint)
    try:
        yield
    finally:
        vars(module).update(rates)
        if checkpoint is not None:
            vars(module)["_gradient_checkpointing_func"] = checkpoint


def _checkpoint_in_eval(module: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def in_eval(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            training, module.training = module.training, False
            try:
                return forward(*args, **kwargs)
            finally:
                module.training = training

        return run

    def checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(in_eval(forward), *args, **kwargs)

    return checkpointed


# The state a model is sampled in, and back.


@contextmanager
def sampling_mode(model: nn.Module, seed: int) -> Iterator[None]:
    """No dropout, no gradient, no checkpointing, and torch's generators (CPU and the model's device) on `seed`.

    Flags of every module and the generators are put back on exit. Checkpointing is switched by its flag and not
    by transformers' enable and disable, of which each pair leaves one more hook on the input embedding.
    """
    flags = [(m, name, value) for m in model.modules() for name, value in _flags(m).items()]
    device = next(model.parameters()).device
    try:
        for module, name, _ in flags:
            setattr(module, name, False)
        with _forked_generators(device), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            if device.type not in ("cpu", "meta"):
                torch.get_device_module(device).manual_seed(seed)
            yield
    finally:
        for module, name, value in flags:
            setattr(module, name, value)


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


def _flags(module: nn.Module) -> dict[str, Any]:
    names = ("training", "gradient_checkpointing")
    return {name: vars(module)[name] for name in names if name in vars(module)}


@contextmanager
def _forked_generators(device: torch.device) -> Iterator[None]:
    cpu = torch.get_rng_state()
    module: Any = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    state = None if module is None else module.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if module is not None:
            module.set_rng_state(state)


# A pass that leaves nothing behind: weights frozen, dropout off, checkpointing on, all of it put back.


@contextmanager
def frozen_pass(model: nn.Module) -> Iterator[None]:
    """Freeze all weights and switch dropout off inside the context; restore everything after it.

    Restored, also after an exception: requires_grad of each parameter, the training flag of each module, the
    attributes that drive gradient checkpointing, and the random state of the CPU and of the model's device.
    """
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(d for d in devices if d is not None)))
        stack.enter_context(_frozen(model))
        stack.enter_context(without_dropout(model))
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    # With no weight requiring grad, autograd never forms a weight gradient: that is where the time goes.
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


# The order in which ZeRO-3 expects modules to need their weights, which a probe's passes must have no part in.


@contextmanager
def untraced(wrapped: Any) -> Iterator[None]:
    """Let ZeRO-3 forget the order of modules that it recorded in the body, or before it; nothing on other engines.

    It gathers weights ahead by the order of the last pass it recorded. If that is a probe's, which calls the head, then
    in the training pass of a TRL trainer, which reads the head's weight without a call, the weight is there ahead of
    time, is not noted as one that the backward needs as well, and is empty when its gradient arrives. TRL forgets the
    order after generation for the same reason. The next pass of training records it again.

    Args:
        wrapped: the model as training calls it; a DeepSpeedEngine of stage 3, or anything else.

    Raises:
        GuardError: before the body, where this DeepSpeed has no such order to forget.
    """
    sharder, coordinator = getattr(getattr(wrapped, "optimizer", None), "parameter_offload", None), None
    if sharder is not None:
        check(seams.ZERO3_TRACER, sharder)
        coordinator = sharder.get_param_coordinator()
        check(seams.ZERO3_TRACE, coordinator)
    try:
        yield
    finally:
        if coordinator is not None and not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
