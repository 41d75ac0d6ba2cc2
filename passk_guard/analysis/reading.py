"""From the mappings of `analysis.json` back to records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from passk_guard.analysis import record
from passk_guard.errors import GuardError

T = TypeVar("T")


def analysis_from(data: Mapping[str, Any]) -> record.Analysis:
    """The record of nested mappings; see `Analysis.from_dict`."""
    return _record(record.Analysis, data)


def _record(kind: type[T], data: Any) -> T:
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if isinstance(data, Mapping):  # what came later has a default, and is not in older files
        later = {field.name for field in fields(kind) if field.default is not MISSING} - data.keys()  # type: ignore[arg-type]
        names -= later
    if not isinstance(data, Mapping) or data.keys() != names:
        found = sorted(data.keys() ^ names) if isinstance(data, Mapping) else type(data).__name__
        raise GuardError(f"Expected the fields of {kind.__name__} in an analysis; found a difference: {found}.")
    hints = get_type_hints(kind, vars(record))
    return kind(**{name: _value(hints[name], data[name]) for name in names})


def _value(hint: Any, value: Any) -> Any:
    arms = [arm for arm in get_args(hint) if arm is not NoneType]
    if value is None:
        return None
    if is_dataclass(hint):
        return _record(hint, value)  # type: ignore[arg-type]
    if get_origin(hint) is list:
        return [_value(arms[0], one) for one in value]
    if get_origin(hint) is tuple:
        return tuple(value)
    return _value(arms[0], value) if len(arms) == 1 and is_dataclass(arms[0]) else value
