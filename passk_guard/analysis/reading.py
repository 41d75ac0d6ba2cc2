"""From the mappings of `analysis.json` back to records, each value of its type: the file may come from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from passk_guard.analysis import record
from passk_guard.analysis.settings import Settings
from passk_guard.estimation.noise import noise_from
from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import brief, one_line

T = TypeVar("T")
_LARGEST = 1e300  # numbers beyond cannot be drawn, and differences of two of them not be held


def analysis_from(data: Mapping[str, Any]) -> record.Analysis:
    """The record of nested mappings; see `Analysis.from_dict`."""
    analysis = _record(record.Analysis, data)
    if analysis.settings.keys() != Settings.__dataclass_fields__.keys():
        raise _difference("settings", analysis.settings)
    Settings(**analysis.settings)
    if analysis.noise is not None:
        noise_from(analysis.noise)
    for what, holds in _RELATIONS.items():
        if not holds(analysis):
            raise GuardError(f"Expected an analysis in which {what}; found others. Make it anew.")
    return analysis


_RELATIONS: Mapping[str, Callable[[record.Analysis], bool]] = {
    "there is an entry for every k": lambda a: [at.k for at in a.at_k] == list(a.settings["ks"]),
    "every status is a known one": lambda a: (
        {at.status for at in a.at_k} <= {"clear", "conflict", "undetermined", None}
    ),
    "the model has a name and a fingerprint": lambda a: a.model.keys() == {"name", "fingerprint"},
    "the curve has a number for every k": lambda a: (
        a.curve is None
        or (
            {len(a.curve.k)} == {len(v) for v in (a.curve.cosine, a.curve.low, a.curve.high, a.curve.established)}
            and len(a.curve.k) > 0
            and min(a.curve.k) > 0
        )
    ),
    "the kernel is a triangle of the prompts it names": lambda a: (
        [len(row) for row in a.kernel.below] == list(range(len(a.kernel.places)))
        and set(a.kernel.places) <= {prompt.place for prompt in a.prompts}
    ),
    "prompts have pass rates, and weights": lambda a: all(
        p.pass_rate.value is not None
        and (p.agreement.value is None or None not in (p.weighted_agreement.value, p.weight.value))
        for p in a.prompts
    ),
    "a sketch covers a part of what there is": lambda a: 0 <= a.sketch.covered <= a.sketch.total and a.sketch.total > 0,
}


def _record(kind: type[T], data: Any) -> T:
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if isinstance(data, Mapping):  # what came later has a default, and is not in older files
        later = {field.name for field in fields(kind) if field.default is not MISSING} - data.keys()  # type: ignore[arg-type]
        names -= later
    if not isinstance(data, Mapping) or data.keys() != names:
        keys = data.keys() ^ names if isinstance(data, Mapping) else [type(data).__name__]
        found = sorted(one_line(str(key), 80) for key in keys)
        raise GuardError(f"Expected the fields of {kind.__name__} in an analysis; found a difference: {found}.")
    hints = get_type_hints(kind, vars(record))
    return kind(**{name: _value(hints[name], data[name], f"{kind.__name__}.{name}") for name in names})


def _value(hint: Any, value: Any, where: str) -> Any:
    arms = get_args(hint)
    if NoneType in arms:
        return None if value is None else _value(next(arm for arm in arms if arm is not NoneType), value, where)
    if is_dataclass(hint):
        return _record(hint, value)  # type: ignore[arg-type]
    if get_origin(hint) in (list, tuple):
        several = arms if get_origin(hint) is tuple else None
        if not isinstance(value, (list, tuple)) or (several and len(value) != len(several)):
            raise _difference(where, value)
        parts = [_value(arm, one, where) for arm, one in zip(several or arms * len(value), value, strict=True)]
        return tuple(parts) if several else parts
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _difference(where, value)
        return {key: _value(arms[1], one, where) for key, one in value.items()}
    if not _is_a(hint, value):
        raise _difference(where, value)
    return value


def _is_a(kind: Any, value: Any) -> bool:
    if kind is Any:
        return True
    if kind is float:
        return type(value) in (int, float) and abs(value) <= _LARGEST and math.isfinite(value)
    if kind is int:
        return type(value) is int and abs(value) < 2**53
    return type(value) is kind


def _difference(where: str, value: Any) -> GuardError:
    return GuardError(f"Expected `{where}` of an analysis as it was written; found {brief(value)}. Make it anew.")
