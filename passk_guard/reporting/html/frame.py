"""What all charts share: escaped markup, the frame with its axes, the legend, the text alternative."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import markupsafe
from markupsafe import Markup

from passk_guard.reporting.html.axes import Axis

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


# In user units; the margins hold tick labels at the size they have on a narrow screen.
WIDTH, HEIGHT = 620, 340
LEFT, RIGHT, TOP, BOTTOM = 76, 604, 34, 284
COLOURS, DASHES = 6, 4


@dataclass(frozen=True)
class Upright:
    """A vertical line at `x`: an alert, k*, a mean. `label` stands in the legend, `title` on the line itself."""

    x: float
    label: str
    colour: int = 5
    dash: int = 2
    title: str = ""


@dataclass(frozen=True)
class Level:
    """A horizontal line at `y`, e.g. a threshold; its label stands in the legend."""

    y: float
    label: str
    colour: int = 5
    dash: int = 1


@dataclass(frozen=True)
class Key:
    """An entry of the legend: the swatch is drawn from the class names of what it explains."""

    swatch: Markup
    name: str


def chart(
    x: Axis,
    y: Axis,
    content: Sequence[Markup],
    keys: Sequence[Key],
    *,
    x_label: str,
    y_label: str,
    title: str,
    alt: str,
) -> Markup:
    """The figure: name, picture with its text alternative, legend."""
    parts = [
        _grid(x, y),
        *content,
        tag("rect", x=LEFT, y=TOP, width=RIGHT - LEFT, height=BOTTOM - TOP, class_="frame"),
        tag("text", y_label, x=4, y=18, class_="axis-name"),
        tag("text", x_label, x=(LEFT + RIGHT) / 2, y=HEIGHT - 4, text_anchor="middle", class_="axis-name"),
    ]
    return figure(parts, legend(keys), title=title, alt=alt, size=(WIDTH, HEIGHT))


def figure(parts: Iterable[Markup], beneath: Markup, *, title: str, alt: str, size: tuple[int, int]) -> Markup:
    """A picture of these parts with its text alternative, its name above and its legend or caption beneath."""
    picture = tag(
        "svg",
        tag("title", title or alt),
        tag("desc", alt),
        *parts,
        class_="chart",
        viewBox=f"0 0 {size[0]} {size[1]}",
        role="img",
        aria_label=f"{title}: {alt}" if title else alt,
    )
    name = tag("p", title, class_="name") if title else ""
    return tag("figure", name, picture, tag("figcaption", beneath) if beneath else "")


def legend(keys: Sequence[Key]) -> Markup:
    """Swatches and names; each name once."""
    once = {key.name: key for key in keys if key.name}
    return tag("ul", *(tag("li", k.swatch, k.name) for k in once.values()), class_="legend") if once else Markup()


def classes(*names: str, colour: int, dash: int = 0) -> str:
    """Class names with those of the colour and the dashes, both counted round."""
    return " ".join([*names, f"c{colour % COLOURS}", f"d{dash % DASHES}"])


def vertical_lines(marks: Sequence[Upright], x: Axis) -> list[Markup]:
    """Those that stand within the frame."""
    return [
        _line("upright", mark, x.at(mark.x), x.at(mark.x), TOP, BOTTOM, tag("title", mark.title or mark.label))
        for mark in marks
        if x.low <= mark.x <= x.high
    ]


def horizontal_lines(marks: Sequence[Level], y: Axis) -> list[Markup]:
    """All of them: the y axis is stretched to hold them."""
    return [_line("level", m, LEFT, RIGHT, y.at(m.y), y.at(m.y), tag("title", m.label)) for m in marks]


def mark_keys(marks: Sequence[Upright], lines: Sequence[Level]) -> list[Key]:
    """Legend entries of vertical and horizontal lines."""
    return [
        *(Key(swatch(_line("upright", m, 18, 18, 1, 13)), m.label) for m in marks),
        *(Key(swatch(_line("level", m, 2, 34, 7, 7)), m.label) for m in lines),
    ]


def swatch(*shapes: Markup) -> Markup:
    """A small picture for the legend; the name beside it says all, so it is hidden from screen readers."""
    return tag("svg", *shapes, viewBox="0 0 36 14", aria_hidden="true")


def dot(x: float, y: float, shape: int, class_: str, title: str = "") -> Markup:
    """A point as a circle, square, triangle or diamond, with a text that shows when it is pointed at."""
    inside = tag("title", title) if title else ""
    if shape % DASHES == 0:
        return tag("circle", inside, cx=x, cy=y, r=3.5, class_=class_)
    path = ("", "m-3.2-3.2h6.4v6.4h-6.4z", "m0-4.4l4.2 7.4h-8.4z", "m0-4.8l4.8 4.8l-4.8 4.8l-4.8-4.8z")[shape % DASHES]
    return tag("path", inside, d=f"M{x:g} {y:g}{path}", class_=class_)


def x_ticks(x: Axis, y: float) -> list[Markup]:
    """Labels of the x axis; every second one is left out on a narrow screen."""
    return [
        tag("text", label, x=x.at(v), y=y, text_anchor="middle", class_="tick second" if i % 2 else "tick")
        for i, (v, label) in enumerate(zip(x.ticks, x.labels, strict=True))
    ]


def _line(
    name: str, mark: Upright | Level, x1: float, x2: float, y1: float, y2: float, title: Markup | str = ""
) -> Markup:
    return tag("line", title, x1=x1, x2=x2, y1=y1, y2=y2, class_=classes(name, colour=mark.colour, dash=mark.dash))


def _grid(x: Axis, y: Axis) -> Markup:
    parts = [tag("line", x1=x.at(v), x2=x.at(v), y1=TOP, y2=BOTTOM, class_="grid") for v in x.ticks]
    parts += x_ticks(x, BOTTOM + 22)
    for value, label in zip(y.ticks, y.labels, strict=True):
        at = y.at(value)
        parts.append(tag("line", x1=LEFT, x2=RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", label, x=LEFT - 8, y=at + 5, text_anchor="end", class_="tick"))
    return join(parts)
