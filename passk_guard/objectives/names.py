"""Objectives by name, as they stand in a configuration: 'grpo', 'passk:8,floor=0.5', 'rs_grpo:beta=2'."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from passk_guard.objectives.group_relative import dr_grpo, grpo, rloo
from passk_guard.objectives.subsets import passk, passk_training
from passk_guard.objectives.utility import maxrl, rs_grpo
from passk_guard.objectives.weighting import Weighting
from passk_guard.utils.errors import GuardError

_CONSTRUCTORS: dict[str, tuple[Callable[..., Weighting], dict[str, type]]] = {
    "grpo": (grpo, {"epsilon": float}),
    "dr_grpo": (dr_grpo, {}),
    "rloo": (rloo, {}),
    "maxrl": (maxrl, {}),
    "passk": (passk, {"k": int, "floor": float, "cap": float}),
    "passk_training": (passk_training, {"k": int}),
    "rs_grpo": (rs_grpo, {"beta": float}),
}
_SPELLINGS = "grpo[:epsilon=E], dr_grpo, rloo, maxrl, passk:K[,floor=F][,cap=C], passk_training:K, rs_grpo:beta=B"


def named_weighting(spec: str) -> Weighting:
    """The weighting a text names.

    Args:
        spec: a name, then after a colon its parameters as `key=value` with commas between; the first parameter may
            stand without its key. One of: grpo[:epsilon=E], dr_grpo, rloo, maxrl, passk:K[,floor=F][,cap=C],
            passk_training:K, rs_grpo:beta=B.

    Raises:
        GuardError: an unknown name or parameter, one that is missing, given twice or not a number, or a value that
            the constructor refuses.
    """
    name, colon, rest = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    constructor, types = _CONSTRUCTORS.get(name.strip(), (None, {}))
    if constructor is None:
        raise GuardError(f"Expected `spec` to be one of {_SPELLINGS}; found {spec!r}.")
    given: dict[str, float] = {}
    for position, part in enumerate(rest.split(",") if colon else []):
        key, value = _parameter(part, list(types)[:1] if position == 0 else [])
        if key not in types or key in given:
            raise _misread(spec, f"parameter {key!r} is {'given twice' if key in given else 'unknown'}")
        given[key] = _number(value, types[key], spec)
    try:
        inspect.signature(constructor).bind(**given)
    except TypeError as error:
        raise _misread(spec, str(error)) from None
    return constructor(**given)


def _parameter(part: str, keys_left_out: list[str]) -> tuple[str, str]:
    """('k', '8') from 'k=8', and from '8' where the key may be left out."""
    key, equals, value = part.partition("=")
    if not equals and keys_left_out:
        return keys_left_out[0], part.strip()
    return key.strip(), value.strip()


def _number(text: str, kind: type, spec: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise _misread(spec, f"{text!r} is not {'a whole number' if kind is int else 'a number'}") from None


def _misread(spec: str, reason: str) -> GuardError:
    return GuardError(f"Expected `spec` to be one of {_SPELLINGS}; found {spec!r}: {reason}.")
