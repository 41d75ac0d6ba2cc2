"""What all charts share: the frame with its axes, the legend, the text alternative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from passk_guard.reporting.html.axes import Axis
from passk_guard.reporting.html.elements import Html, escape, join, tag

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

    swatch: Html
    name: str


def chart(
    x: Axis, y: Axis, content: Sequence[Html], keys: Sequence[Key], *, x_label: str, y_label: str, title: str, alt: str
) -> Html:
    """The figure: name, picture with its text alternative, legend."""
    picture = tag(
        "svg",
        tag("title", title or alt),
        tag("desc", alt),
        _grid(x, y),
        *content,
        tag("rect", x=LEFT, y=TOP, width=RIGHT - LEFT, height=BOTTOM - TOP, class_="frame"),
        tag("text", y_label, x=4, y=18, class_="axis-name"),
        tag("text", x_label, x=(LEFT + RIGHT) / 2, y=HEIGHT - 4, text_anchor="middle", class_="axis-name"),
        class_="chart",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}: {alt}" if title else alt,
    )
    return figure(title, picture, legend(keys))


def figure(title: str, picture: Html, beneath: Html) -> Html:
    """A picture with its name above and its legend or caption beneath."""
    name = tag("p", title, class_="name") if title else Html()
    return tag("figure", name, picture, tag("figcaption", beneath) if beneath else Html())


def legend(keys: Sequence[Key]) -> Html:
    """Swatches and names; each name once."""
    once = {key.name: key for key in keys if key.name}
    return tag("ul", join(tag("li", k.swatch, k.name) for k in once.values()), class_="legend") if once else Html()


def classes(*names: str, colour: int, dash: int = 0) -> str:
    """Class names with those of the colour and the dashes, both counted round."""
    return " ".join([*names, f"c{colour % COLOURS}", f"d{dash % DASHES}"])


def uprights(marks: Sequence[Upright], x: Axis) -> list[Html]:
    """The vertical lines that stand within the frame."""
    return [
        tag(
            "line",
            tag("title", mark.title or mark.label),
            x1=x.at(mark.x),
            x2=x.at(mark.x),
            y1=TOP,
            y2=BOTTOM,
            class_=classes("upright", colour=mark.colour, dash=mark.dash),
        )
        for mark in marks
        if x.low <= mark.x <= x.high
    ]


def levels(marks: Sequence[Level], y: Axis) -> list[Html]:
    """The horizontal lines."""
    return [
        tag(
            "line",
            tag("title", mark.label),
            x1=LEFT,
            x2=RIGHT,
            y1=y.at(mark.y),
            y2=y.at(mark.y),
            class_=classes("level", colour=mark.colour, dash=mark.dash),
        )
        for mark in marks
    ]


def mark_keys(marks: Sequence[Upright], lines: Sequence[Level]) -> list[Key]:
    """Legend entries of vertical and horizontal lines."""
    return [
        *(Key(swatch(_stroke(18, 18, 1, 13, "upright", m)), m.label) for m in marks),
        *(Key(swatch(_stroke(2, 34, 7, 7, "level", m)), m.label) for m in lines),
    ]


def swatch(*shapes: Html) -> Html:
    """A small picture for the legend; the name beside it says all, so it is hidden from screen readers."""
    return tag("svg", *shapes, viewBox="0 0 36 14", aria_hidden="true")


def dot(x: float, y: float, shape: int, class_: str, title: str = "") -> Html:
    """A point as a circle, square, triangle or diamond, with a text that shows when it is pointed at."""
    inside = tag("title", title) if title else Html()
    if shape % DASHES == 0:
        return tag("circle", inside, cx=x, cy=y, r=3.5, class_=class_)
    path = ("", "m-3.2-3.2h6.4v6.4h-6.4z", "m0-4.4l4.2 7.4h-8.4z", "m0-4.8l4.8 4.8l-4.8 4.8l-4.8-4.8z")[shape % DASHES]
    return tag("path", inside, d=f"M{x:g} {y:g}{path}", class_=class_)


def _stroke(x1: float, x2: float, y1: float, y2: float, name: str, mark: Upright | Level) -> Html:
    return tag("line", x1=x1, x2=x2, y1=y1, y2=y2, class_=classes(name, colour=mark.colour, dash=mark.dash))


def _grid(x: Axis, y: Axis) -> Html:
    parts = []
    for number, (value, label) in enumerate(zip(x.ticks, x.labels, strict=True)):
        at, second = x.at(value), "tick second" if number % 2 else "tick"
        parts.append(tag("line", x1=at, x2=at, y1=TOP, y2=BOTTOM, class_="grid"))
        parts.append(tag("text", label, x=at, y=BOTTOM + 22, text_anchor="middle", class_=second))
    for value, label in zip(y.ticks, y.labels, strict=True):
        at = y.at(value)
        parts.append(tag("line", x1=LEFT, x2=RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", label, x=LEFT - 8, y=at + 5, text_anchor="end", class_="tick"))
    return join(map(escape, parts))
