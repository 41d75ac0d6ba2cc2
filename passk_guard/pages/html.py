"""Text and markup told apart by type: text is escaped wherever it enters, and only `tag` and `join` make markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

_WITHOUT_CONTENT = {"meta", "img", "br", "wbr", "hr"}
# Controls (terminal escapes among them) do nothing in HTML but hide, and bidirectional overrides reorder what is read.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
_HIDDEN = re.compile("[\u0080-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Html(str):
    """Markup that is safe to put into a page: what `tag`, `join` and `escape` return.

    Adding or formatting one gives a plain `str`, which the next component escapes again: a slip shows as visible
    entities, never as markup.
    """

    __slots__ = ()


def escape(value: Any) -> Html:
    """Text made safe for element content and for quoted attributes; `Html` comes back as it is.

    Control characters become their visible pictures, bidirectional overrides their code points, and halves of
    surrogate pairs, which no UTF-8 file can hold, U+FFFD.
    """
    return value if isinstance(value, Html) else Html(html.escape(visible(str(value)), quote=True))


def tag(element: str, /, *children: Any, **attributes: Any) -> Html:
    """One element: `tag("p", "a < b", class_="note")` is `<p class="note">a &lt; b</p>`.

    Args:
        element: its name; names of elements and attributes come from this package only and are not escaped.
        children: text, which is escaped, or `Html`.
        attributes: a trailing `_` is dropped and other `_` become `-`; None and False leave the attribute out, True
            gives it no value.
    """
    opening = "".join([element, *(_attribute(key, value) for key, value in attributes.items())])
    if element in _WITHOUT_CONTENT:
        return Html(f"<{opening}>")
    return Html(f"<{opening}>{join(children)}</{element}>")


def join(parts: Iterable[Any], separator: str = "") -> Html:
    """Texts and `Html` one after the other, texts escaped."""
    return Html(escape(separator).join(escape(part) for part in parts))


def _attribute(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    # An attribute is text even where it holds markup: `escape` would let its quotes through.
    return f" {name}" if value is True else f' {name}="{html.escape(visible(str(value)), quote=True)}"'


def visible(text: str) -> str:
    """Text without anything that hides: control characters, bidirectional overrides and lone surrogates are shown."""
    text = text.replace("\r\n", "\n")
    text = _CONTROL.sub(lambda match: chr(0x2421 if match[0] == "\x7f" else 0x2400 + ord(match[0])), text)
    text = _HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)
    return _LONE_SURROGATE.sub("\ufffd", text)
