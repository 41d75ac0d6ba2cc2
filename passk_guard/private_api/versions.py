"""Which versions are installed, and which ones are supported."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version


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
