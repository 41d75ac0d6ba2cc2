"""States over time as strips beneath each other: told apart by colour, by height and by outline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from passk_guard.reporting.html.axes import make_axis
from passk_guard.reporting.html.elements import Html, join, tag
from passk_guard.reporting.html.frame import LEFT, RIGHT, WIDTH, Key, classes, figure, legend, swatch


@dataclass(frozen=True)
class Span:
    """A state that held from `start` to `end`; `title` shows when it is pointed at."""

    start: float
    end: float
    state: str
    title: str = ""


@dataclass(frozen=True)
class Look:
    """How a state is drawn.

    Attributes:
        colour: 0..5.
        height: share of the strip, in (0, 1].
        filled: False leaves an outline.
        dash: of the outline, 0..3.
    """

    colour: int
    height: float = 1.0
    filled: bool = True
    dash: int = 0


_STRIP, _TOP, _NAME = 34, 8, 26


def timeline(
    lanes: Mapping[str, Sequence[Span]], looks: Mapping[str, Look], *, x_label: str, alt: str, title: str = ""
) -> Html:
    """One strip for each lane over a common axis.

    Args:
        lanes: spans by the name of the lane, which stands above its strip where there are several.
        looks: of every state that occurs, in the order of the legend.
        x_label: text at the axis; alt: what the picture shows; title: above it.
    """
    spans = [span for lane in lanes.values() for span in lane]
    x = make_axis([v for span in spans for v in (span.start, span.end)], LEFT, RIGHT, whole=True)
    step = _STRIP + (_NAME if len(lanes) > 1 else 8)
    bottom = _TOP + step * len(lanes)
    strips = []
    for number, (name, lane) in enumerate(lanes.items()):
        foot = _TOP + step * (number + 1)
        heading = tag("text", name, x=LEFT, y=foot - _STRIP - 5) if len(lanes) > 1 else Html()
        strips += [heading, *(_bar(span, looks[span.state], x.at(span.start), x.at(span.end), foot) for span in lane)]
    ticks = [
        tag("text", label, x=x.at(v), y=bottom + 24, text_anchor="middle", class_="tick second" if i % 2 else "tick")
        for i, (v, label) in enumerate(zip(x.ticks, x.labels, strict=True))
    ]
    axis = tag("line", x1=LEFT, x2=RIGHT, y1=bottom + 2, y2=bottom + 2, class_="grid")
    name = tag("text", x_label, x=(LEFT + RIGHT) / 2, y=bottom + 50, text_anchor="middle", class_="axis-name")
    picture = tag(
        "svg",
        tag("title", title or alt),
        tag("desc", alt),
        axis,
        join(strips),
        join(ticks),
        name,
        class_="chart",
        viewBox=f"0 0 {WIDTH} {bottom + 56}",
        role="img",
        aria_label=f"{title}: {alt}" if title else alt,
    )
    return figure(title, picture, legend([_key(state, look) for state, look in looks.items()]))


def _bar(span: Span, look: Look, left: float, right: float, foot: float) -> Html:
    height = look.height * _STRIP
    place = {"x": left, "y": foot - height, "width": max(right - left - 1, 2), "height": height}
    return tag("rect", tag("title", span.title or span.state), **place, class_=_style(look))


def _key(state: str, look: Look) -> Key:
    height = 12 * look.height
    return Key(swatch(tag("rect", x=3, y=13 - height, width=30, height=height, class_=_style(look))), state)


def _style(look: Look) -> str:
    return classes("block", *(["filled"] if look.filled else []), colour=look.colour, dash=look.dash)
