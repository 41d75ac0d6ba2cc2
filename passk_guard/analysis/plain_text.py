"""Untrusted text made safe to print: nothing in a prompt may steer the terminal."""

from __future__ import annotations

import re
import unicodedata

# CSI (colours, cursor), OSC (titles, links) up to its end, and other two-character escapes, in 7- and 8-bit form.
_ESCAPES = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c)?|\x1b[ -/]*[0-~]"
)
_HIDING = {"Cc", "Cf", "Cs", "Co", "Cn"}


def plain_text(text: str) -> str:
    """The text on one line without escape sequences, control, formatting (bidirectional) and unassigned characters."""
    kept = _ESCAPES.sub("", text)
    shown = (" " if one.isspace() else "" if unicodedata.category(one) in _HIDING else one for one in kept)
    return " ".join("".join(shown).split())
