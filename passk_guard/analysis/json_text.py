"""JSON that every reader takes: no NaN, no infinity."""

from __future__ import annotations

import json
from typing import Any


def to_json(value: Any) -> str:
    """Indented JSON text, lists of numbers on one line each.

    Raises:
        ValueError: a number that is NaN or infinite, which is a slip in this package.
    """
    return _written(value, "") + "\n"


def _written(value: Any, indent: str) -> str:
    deeper = indent + " "
    if isinstance(value, dict) and value:
        items = (f"{deeper}{json.dumps(str(key))}: {_written(one, deeper)}" for key, one in value.items())
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, (list, tuple)) and any(isinstance(one, (dict, list, tuple)) for one in value):
        return "[\n" + ",\n".join(deeper + _written(one, deeper) for one in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
