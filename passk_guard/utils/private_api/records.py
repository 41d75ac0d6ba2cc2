"""What is written down of a private or undocumented name: where it is met, what it is for, and who touches it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Seam:
    """Where a library is touched.

    Attributes:
        library: name of its distribution.
        owner: what has the names.
        applies: in which engine or with which trainer.
        instead: what to do without it, for the error.
    """

    library: str
    owner: str
    applies: str
    instead: str


@dataclass(frozen=True)
class Private:
    """One name.

    Attributes:
        seam: where it is touched.
        name: of the attribute.
        purpose: what it is for here; of an optional one also why its absence does no harm.
        files: of the package, that touch it.
        required: whether its absence would change a result or break a run.
    """

    seam: Seam
    name: str
    purpose: str
    files: tuple[str, ...]
    required: bool


def rows(
    seam: Seam, files: str, required: Mapping[str, str] = _NOTHING, optional: Mapping[str, str] = _NOTHING
) -> Iterator[Private]:
    """The names of one seam that the same files touch, name -> purpose."""
    for names, needed in ((required, True), (optional, False)):
        yield from (Private(seam, name, purpose, tuple(files.split()), needed) for name, purpose in names.items())
