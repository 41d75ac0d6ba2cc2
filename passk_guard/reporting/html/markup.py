"""Text and markup told apart by type: text is escaped wherever it enters, `markupsafe.Markup` is not escaped again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import markupsafe
from markupsafe import Markup

# Controls (terminal escapes among them) do nothing in HTML but hide, and bidirectional overrides reorder what is read.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
_HIDDEN = re.compile("[\u0080-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def visible(value: Any) -> Any:
    """Text without anything that hides, for all that the templates print; `Markup` comes back as it is.

    Control characters become their visible pictures, bidirectional overrides their code points, and halves of
    surrogate pairs, which no UTF-8 file can hold, U+FFFD.
    """
    if hasattr(value, "__html__"):
        return value
    text = str(value).replace("\r\n", "\n")
    text = _CONTROL.sub(lambda match: chr(0x2421 if match[0] == "\x7f" else 0x2400 + ord(match[0])), text)
    text = _HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)
    return _LONE_SURROGATE.sub("\ufffd", text)


def escape(value: Any) -> Markup:
    """Text made visible, and safe for element content and quoted attributes; `Markup` comes back as it is."""
    return markupsafe.escape(visible(value))


def join(parts: Iterable[Any]) -> Markup:
    """Texts, escaped, and `Markup` one after the other."""
    return Markup("").join(map(escape, parts))


def tag(element: str, /, *children: Any, **attributes: Any) -> Markup:
    """One element of a chart: `tag("text", "a < b", class_="tick")` is `<text class="tick">a &lt; b</text>`.

    Args:
        element: its name; names of elements and attributes come from this package only and are not escaped.
        children: text, which is escaped, or `Markup`.
        attributes: a trailing `_` is dropped and other `_` become `-`; None leaves the attribute out. A value is text
            even where it holds markup: unescaped, its quotes would end the attribute.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{element}{written}>{join(children)}</{element}>")
