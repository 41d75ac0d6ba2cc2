"""Small pieces of a page: paragraphs, callouts, facts, figures beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from passk_guard.pages.html import Html, join, tag


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
