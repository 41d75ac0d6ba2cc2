"""Tables that sort by mouse and keyboard, in a box that scrolls by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from passk_guard.reporting.html.axes import is_number, write_number
from passk_guard.reporting.html.elements import Html, join, tag

_SHORT = 80  # characters of a text that are shown at once
_WRAPPED = 24  # a longer text may be broken into lines, and gets a column wide enough for that


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: heading, text.
        kind: "number" aligns to the right and sorts by value, "text" sorts by letters and is cut when long.
        digits: decimals of a float; None writes four significant digits. Whole numbers stay whole.
    """

    name: str
    kind: Literal["text", "number"] = "text"
    digits: int | None = None


def table(columns: Sequence[Column], rows: Sequence[Sequence[Any]], *, caption: str) -> Html:
    """A sortable table; a heading's button sorts, first falling for numbers and rising for texts, then the other way.

    Args:
        columns: headings.
        rows: one value a column: numbers, texts (escaped; long ones open on demand), `Html` of a component, or None,
            which shows as a dash and sorts last.
        caption: what the table holds; also the name of its box for screen readers.
    """
    head = tag("thead", tag("tr", join(_heading(column) for column in columns)))
    body = tag("tbody", join(_row(columns, row) for row in rows))
    whole = tag("table", tag("caption", caption), head, body, class_="sortable")
    return tag("div", whole, class_="table-box", tabindex=0, role="region", aria_label=caption)


def cut_text(text: str, length: int = _SHORT) -> Html:
    """The text, escaped; if long or of several lines, its beginning with the whole of it behind a disclosure."""
    first = text.split("\n", 1)[0]
    if len(text) <= length and first == text:
        return tag("span", text)
    return tag("details", tag("summary", first[:length].rstrip() + " …"), tag("div", text, class_="whole"))


def _heading(column: Column) -> Html:
    return tag("th", tag("button", column.name, type="button"), scope="col", class_=column.kind)


def _row(columns: Sequence[Column], row: Sequence[Any]) -> Html:
    return tag("tr", join(_cell(column, value) for column, value in zip(columns, row, strict=True)))


def _cell(column: Column, value: Any) -> Html:
    if value is None or (column.kind == "number" and not is_number(value)):
        return tag("td", "–", class_=column.kind)
    if column.kind == "number":
        return tag("td", _written(column, value), class_="number", data_sort=repr(float(value)))
    shown = value if isinstance(value, Html) else cut_text(str(value))
    style = "text long" if len(str(value)) > _WRAPPED else "text"
    return tag("td", shown, class_=style, data_sort=None if isinstance(value, Html) else str(value)[:200])


def _written(column: Column, value: float) -> str:
    if isinstance(value, int) or column.digits is None:
        return write_number(value, 1 if isinstance(value, int) else None)
    return write_number(value, 10.0**-column.digits)
