"""What an analysis is made of: the user's function, a local model, its tokenizer, its last hidden layer.

Nothing is downloaded. arXiv 2602.21189 takes its language models' gradients with respect to the last hidden layer. Our
reading, since the text names no parameters: all trainable parameters of the last decoder block (attention, MLP and the
norms in it), and neither the final norm nor the output embedding. With PEFT, the adapters in that block.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import describe_error, first_of

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "*.bin.index.json")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTER_CONFIG = "adapter_config.json"
_NAME_MODULES = ("megatron_config", "auto_mapping")


def import_function(name: str) -> Callable[..., Any]:
    """Import `module:function`, with the current directory on the path as `python -m` has it.

    Only ever called with what the user typed: importing a module runs it.

    Raises:
        GuardError: another form, a module that is not found or raises, or no such function in it.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not attribute.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise GuardError(
            f"Expected `--correct` as module:function, e.g. rewards:is_correct; found {name!r}. Name a module that can "
            "be imported from the current directory, without .py, and a function in it."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module can raise anything
        raise GuardError(
            f"Expected a module {module_name!r} that can be imported, for `--correct {name}`; it raised "
            f"{describe_error(error)}. The current directory {os.getcwd()!r} is on the path."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = "nothing of that name" if function is None else type(function).__name__
        raise GuardError(
            f"Expected a function {attribute!r} in {module_name!r}; found {found}. Functions there: {_named(module)}."
        )
    return function


def _named(module: Any) -> str:
    own = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    return ", ".join(sorted(own)[:10]) or "none"


def load_model(directory: str | Path, *, adapter: str | Path | None = None, base: str | Path | None = None) -> Any:
    """A causal LM whose trainable parameters are those that training would change.

    Args:
        directory: a model as `save_pretrained` writes it, or an adapter with its `adapter_config.json`.
        adapter: an adapter to put on the model in `directory`.
        base: the model an adapter in `directory` belongs on; by default the one its config names, if it is local.

    Returns:
        The model in the dtype it was saved in; with an adapter only the adapter's parameters require grad.

    Raises:
        GuardError: no such directory, no config or weights in it, an adapter without a local base, PEFT not installed,
            or a model transformers cannot load.
    """
    place, on_top = _model_and_adapter(directory, adapter, base)
    _check_weights(place)
    from transformers import AutoModelForCausalLM

    model = _loaded(AutoModelForCausalLM, place, "a causal language model", dtype="auto")
    return model if on_top is None else _with_adapter(model, on_top)


def is_adapter(directory: str | Path) -> bool:
    """Whether the directory holds a PEFT adapter's config."""
    return (Path(directory) / _ADAPTER_CONFIG).exists()


def check_model(directory: str | Path, *, base: str | Path | None = None) -> None:
    """Refuse a directory in which `load_model` would miss files, without loading it; errors as there."""
    _check_weights(_model_and_adapter(directory, None, base)[0])


def load_tokenizer(directory: str | Path, *, adapter: str | Path | None = None, base: str | Path | None = None) -> Any:
    """The tokenizer of the adapter if it has one, else of the model; arguments as for `load_model`.

    Raises:
        GuardError: as `load_model`, or no tokenizer in either directory.
    """
    place, on_top = _model_and_adapter(directory, adapter, base)
    holders = [p for p in (on_top, place) if p is not None and any((p / name).exists() for name in _TOKENIZER)]
    if not holders:  # transformers would make one with an empty vocabulary
        raise GuardError(
            f"Expected a tokenizer beside the model ({', '.join(_TOKENIZER)}); found {_listed(place)} in "
            f"{str(place)!r}. Save it there with `tokenizer.save_pretrained`."
        )
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer, holders[0], "a tokenizer")


def _model_and_adapter(
    directory: str | Path, adapter: str | Path | None, base: str | Path | None
) -> tuple[Path, Path | None]:
    place = _directory(directory, "model")
    if not is_adapter(place):
        if base is not None:
            raise GuardError(f"Expected `base` with an adapter only; found no {_ADAPTER_CONFIG} in {str(place)!r}.")
        return place, None if adapter is None else _adapter(adapter)
    if adapter is not None:
        raise GuardError(f"Expected one adapter; found {str(place)!r}, which is one, and {str(adapter)!r}.")
    return _base_of(place, base), _adapter(place)


def _base_of(place: Path, base: str | Path | None) -> Path:
    if base is not None:
        return _directory(base, "base model")
    named = _read_config(place / _ADAPTER_CONFIG).get("base_model_name_or_path")
    if not named or not Path(named).is_dir():
        raise GuardError(
            f"Expected the adapter in {str(place)!r} to name a local base model; found {named!r}. Nothing is "
            "downloaded: pass the base's directory with --base."
        )
    return Path(named)


def _adapter(adapter: str | Path) -> Path:
    place = _directory(adapter, "adapter")
    if not (place / _ADAPTER_CONFIG).exists() or not any((place / name).exists() for name in _ADAPTER_WEIGHTS):
        raise GuardError(
            f"Expected a PEFT adapter, {_ADAPTER_CONFIG} and its weights; found {_listed(place)} in {str(place)!r}."
        )
    config = _read_config(place / _ADAPTER_CONFIG)
    if named := [name for name in _NAME_MODULES if config.get(name)]:
        raise GuardError(
            f"Expected an adapter whose config names no Python module; found {named[0]!r} in {str(place)!r}, which "
            "PEFT would import. Take it out where it is not needed."
        )
    return place


def _directory(path: str | Path, what: str) -> Path:
    place = Path(path)
    _refuse_gguf(place)
    if not place.is_dir():
        found = "a file" if place.exists() else "nothing"
        raise GuardError(f"Expected the directory of a local {what}; found {found} at {str(path)!r}.")
    return place


def _refuse_gguf(place: Path) -> None:
    """Say how to convert a .gguf file, where the path is one or the directory holds no other weights."""
    files = sorted(place.glob("*.gguf")) if place.is_dir() else [place] * (place.suffix == ".gguf" and place.is_file())
    if files and not any(next(place.glob(pattern), None) for pattern in _WEIGHTS):
        folder, name = str(files[0].parent), files[0].name
        raise GuardError(
            f"Expected a model as `save_pretrained` writes it; found {name} in {folder!r}: convert it. With the "
            f"package gguf, transformers reads it by AutoModelForCausalLM.from_pretrained({folder!r}, "
            f"gguf_file={name!r}), and the tokenizer alike. Its `save_pretrained` refuses while the config has a "
            "`quantization_config`: delete that, make a model of the class from the config, load the state dict into "
            "it, and save both."
        )


def _check_weights(place: Path) -> None:
    if not (place / "config.json").exists():
        raise GuardError(
            f"Expected a model as `save_pretrained` writes it, with a config.json; found {_listed(place)} in "
            f"{str(place)!r}. A checkpoint sharded by its engine must be merged first."
        )
    if not any(next(place.glob(pattern), None) for pattern in _WEIGHTS):
        raise GuardError(
            f"Expected weights (*.safetensors or pytorch_model.bin); found {_listed(place)} in {str(place)!r}."
        )


def _with_adapter(model: Any, place: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise GuardError("Expected PEFT to be installed, to load an adapter. pip install peft") from error
    try:
        return PeftModel.from_pretrained(model, str(place), is_trainable=True, local_files_only=True)
    except Exception as error:
        raise GuardError(f"Expected an adapter that fits its base in {str(place)!r}; {_raised(error)}.") from error


def _loaded(loader: Any, place: Path, what: str, **options: Any) -> Any:
    try:
        # Without `trust_remote_code`, transformers would ask on the terminal whether to run the model's code.
        return loader.from_pretrained(str(place), local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many kinds, of which only the text is of use
        raise GuardError(
            f"Expected {what} that transformers can load from {str(place)!r}; {_raised(error)}."
        ) from error


def _raised(error: Exception) -> str:
    return f"it raised {type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GuardError(f"Expected JSON in {str(path)!r}; {error}.") from error
    return content if isinstance(content, dict) else {}


def _listed(place: Path) -> str:
    return first_of(sorted(entry.name for entry in place.iterdir()), 6) or "nothing"


def last_hidden_layer(model: nn.Module) -> nn.Module:
    """The last block of the stack of decoder blocks: of the `nn.ModuleList` with `config.num_hidden_layers` entries.

    Raises:
        GuardError: the model has no such list, or the block has no trainable parameter.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(text, "num_hidden_layers", None)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not depth or not stacks:
        raise GuardError(
            "Expected a model with a list of `config.num_hidden_layers` decoder blocks, to take the last hidden layer "
            f"of; found none in {type(model).__name__}. Leave out `last_layer`."
        )
    # A mixture of experts can have as many experts as layers: the stack of blocks is the one that holds the most.
    last: nn.Module = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))[-1]
    if not any(p.requires_grad for p in last.parameters()):
        raise GuardError(
            "Expected trainable parameters in the last hidden layer; found none. With PEFT the adapter has to reach "
            "the last block: leave out `last_layer`."
        )
    return last


@contextmanager
def only_last_hidden_layer(model: nn.Module) -> Iterator[None]:
    """Let no other parameter require grad inside, since the sketch covers those that do. Restore them on exit.

    Raises:
        GuardError: as `last_hidden_layer`.
    """
    inside = {id(p) for p in last_hidden_layer(model).parameters()}
    outside = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    for p in outside:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in outside:
            p.requires_grad_(True)
