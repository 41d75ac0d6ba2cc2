"""Small pieces of a page: paragraphs, callouts, facts, figures beside each other."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

# Text and markup told apart by type: text is escaped wherever it enters, and only `tag` and `join` make markup.


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


def paragraph(text: Any, *, note: bool = False) -> Html:
    """A paragraph of text, escaped; `note` sets it small and grey."""
    return tag("p", text, class_="note" if note else None)


def callout(text: Any, kind: Literal["", "bad", "good"] = "") -> Html:
    """A paragraph that stands out, escaped."""
    return tag("p", text, class_=f"callout {kind}".strip())


def facts(pairs: Mapping[str, Any]) -> Html:
    """Short names and values in boxes; a value of None shows as a dash."""
    boxes = [tag("div", tag("dt", name), tag("dd", dash(value))) for name, value in pairs.items()]
    return tag("dl", join(boxes), class_="facts")


def figures(*parts: Html) -> Html:
    """Figures beside each other where the screen is wide enough, else one below the other."""
    return tag("div", join(parts), class_="figures")


def bullets(items: Iterable[Any]) -> Html:
    """A list, each item escaped."""
    return tag("ul", join(tag("li", item) for item in items))


def dash(value: Any) -> Any:
    """The value, or a dash where there is none."""
    return "–" if value is None else value
