"""Private or undocumented names of other libraries that the guard relies on.

Such a name may go away with any release. The code that uses names declares them with `requires(...)` and checks them
when train() begins or an engine is chosen. A missing name is then an error with a remedy and not a wrong result later.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from passk_guard.utils.errors import GuardError

OBSERVE = "take the guard off"
REWEIGHT = "mitigate by `reweight`, which edits no gradient"


@dataclass(frozen=True)
class Requires:
    """Names that one kind of object of another library must have.

    Attributes:
        library: name of its distribution.
        owner: class of the object, or what it is.
        applies: with which trainer or engine the names are used.
        instead: what to do without them.
        names: each name and what it is for.
    """

    library: str
    owner: str
    applies: str
    instead: str
    names: Mapping[str, str]

    def also(self, **names: str) -> Requires:
        """The same with more names."""
        return replace(self, names={**self.names, **names})

    def check(self, obj: Any) -> None:
        """Read the names of `obj`, an object of this kind or its class.

        Raises:
            GuardError: with the missing names, the installed and the supported versions, and the remedy.
        """
        missing = [f"`{name}` ({purpose})" for name, purpose in self.names.items() if not _has(obj, name)]
        if missing:
            found = (obj if isinstance(obj, type) else type(obj)).__name__
            raise GuardError(
                f"Expected a {self.owner} of {self.library} {supported(self.library)} for {self.applies}; found "
                f"{found} with {self.library} {installed(self.library)}, which lacks {', '.join(missing)}. Install a "
                f"supported version of {self.library}, an earlier one if yours is newer than this release of "
                f"passk_guard, or {self.instead}."
            )


def requires(library: str, owner: str, applies: str, instead: str, **names: str) -> Requires:
    """`Requires` with its names as keywords: `requires("torch", "Tensor", ..., _version="finds written gradients")`."""
    return Requires(library, owner, applies, instead, names)


def installed(library: str) -> str:
    """Version of a library, or "(not installed)"."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def supported(library: str) -> str:
    """Versions that passk-guard asks for, such as ">=1.0", from its metadata; where to look them up without it."""
    try:
        wanted = importlib.metadata.requires("passk-guard") or []
    except importlib.metadata.PackageNotFoundError:
        wanted = []
    ranges = (re.match(rf"{re.escape(library)}\s*([<>=!~][^;]*)", line) for line in wanted)
    return next((match[1].strip() for match in ranges if match), "(versions: pyproject.toml of passk-guard)")


def is_trl(trainer: Any) -> bool:
    """Whether `trainer` is a GRPOTrainer or RLOOTrainer by name: importing trl takes seconds."""
    return any(kind.__name__ in ("GRPOTrainer", "RLOOTrainer") for kind in type(trainer).__mro__)


def _has(obj: Any, name: str) -> bool:
    try:
        return hasattr(obj, name)
    except Exception:  # a property that cannot be read now exists all the same
        return True
