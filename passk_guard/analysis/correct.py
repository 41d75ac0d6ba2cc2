"""`module:function` from the command line the user typed."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import describe_error


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
