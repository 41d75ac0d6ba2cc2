"""Asking for the names of a seam, and what is said when one is gone."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from passk_guard.utils.errors import GuardError
from passk_guard.utils.private_api.deepspeed import OF_DEEPSPEED
from passk_guard.utils.private_api.records import Seam
from passk_guard.utils.private_api.trainers import OF_TRAINERS

# Which versions are installed, and which ones are supported.


def installed(library: str) -> str:
    """Version of a library, or "(not installed)"."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "(not installed)"


def supported(library: str) -> str:
    """Versions that passk-guard asks for, such as ">=1.0", from its metadata; what to look at where it has none."""
    try:
        wanted = requires("passk-guard") or []
    except PackageNotFoundError:
        wanted = []
    ranges = (re.match(rf"{re.escape(library)}\s*([<>=!~][^;]*)", line) for line in wanted)
    return next((match[1].strip() for match in ranges if match), "(versions: pyproject.toml of passk-guard)")


TABLE = (*OF_TRAINERS, *OF_DEEPSPEED)
"""One row for each name at each seam."""


def check(seam: Seam, obj: Any) -> None:
    """Raise GuardError unless `obj`, of the kind `seam.owner` or its class, has the names that are required of it.

    Raises:
        GuardError: with what is missing and why it is needed, the installed version, the supported ones, and what to
            do instead.
        ValueError: nothing is known of this seam.
    """
    rows = [row for row in TABLE if row.seam == seam]
    if not rows:
        raise ValueError(f"Expected a seam of the table; found {seam}.")
    if missing := [row for row in rows if row.required and not _has(obj, row.name)]:
        names = ", ".join(f"`{row.name}` ({row.purpose})" for row in missing)
        found = (obj if isinstance(obj, type) else type(obj)).__name__
        raise GuardError(
            f"Expected a {seam.owner} of {seam.library} {supported(seam.library)} for {seam.applies}; found {found} "
            f"with {seam.library} {installed(seam.library)}, which lacks {names}. Install a supported version of "
            f"{seam.library}, an earlier one if yours is newer than this release of passk_guard, or {seam.instead}."
        )


def is_trl(trainer: Any) -> bool:
    """Whether `trainer` is a GRPOTrainer or RLOOTrainer by name, whatever it has: importing trl takes seconds."""
    return any(kind.__name__ in ("GRPOTrainer", "RLOOTrainer") for kind in type(trainer).__mro__)


def _has(obj: Any, name: str) -> bool:
    try:
        return hasattr(obj, name)
    except Exception:  # a property that cannot be read now is there all the same
        return True
