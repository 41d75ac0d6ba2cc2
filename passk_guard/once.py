"""Telling each thing once, and not without end."""

from __future__ import annotations


class Once:
    """Says whether a text is told for the first time.

    Texts of exceptions may hold what differs each time, an address or a step: after `most` different ones nothing is
    new any more, so that neither the log nor the memory of a long run fills with them.

    Args:
        most: different texts that are ever told, >= 1.
    """

    def __init__(self, most: int = 100) -> None:
        self._most = most
        self._told: set[str] = set()

    def new(self, text: str) -> bool:
        """Whether to tell it now; the same text is not told again."""
        if text in self._told or len(self._told) >= self._most:
            return False
        self._told.add(text)
        return True
