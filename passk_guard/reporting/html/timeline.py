"""States over time as strips beneath each other: told apart by colour, by height and by outline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from passk_guard.reporting.html.axes import make_axis
from passk_guard.reporting.html.frame import LEFT, RIGHT, WIDTH, Key, classes, figure, legend, swatch, tag, x_ticks


@dataclass(frozen=True)
class Span:
    """A state that held from `start` to `end`; `title` shows when it is pointed at."""

    start: float
    end: float
    state: str
    title: str = ""


@dataclass(frozen=True)
class Style:
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

    def __str__(self) -> str:
        return classes("block", *(["filled"] if self.filled else []), colour=self.colour, dash=self.dash)


_STRIP, _TOP, _NAME = 34, 8, 26


def timeline(
    lanes: Mapping[str, Sequence[Span]], styles: Mapping[str, Style], *, x_label: str, alt: str, title: str = ""
) -> Markup:
    """One strip for each lane over a common axis.

    Args:
        lanes: spans by the name of the lane, which stands above its strip where there are several.
        styles: of every state that occurs, in the order of the legend.
        x_label: text at the axis; alt: what the picture shows; title: above it.
    """
    spans = [span for lane in lanes.values() for span in lane]
    x = make_axis([v for span in spans for v in (span.start, span.end)], LEFT, RIGHT, whole=True)
    step = _STRIP + (_NAME if len(lanes) > 1 else 8)
    bottom = _TOP + step * len(lanes)
    parts = [tag("line", x1=LEFT, x2=RIGHT, y1=bottom + 2, y2=bottom + 2, class_="grid")]
    for number, (name, lane) in enumerate(lanes.items()):
        foot = _TOP + step * (number + 1)
        if len(lanes) > 1:
            parts.append(tag("text", name, x=LEFT, y=foot - _STRIP - 5))
        parts += [_bar(span, styles[span.state], x.at(span.start), x.at(span.end), foot) for span in lane]
    parts += x_ticks(x, bottom + 24)
    parts.append(tag("text", x_label, x=(LEFT + RIGHT) / 2, y=bottom + 50, text_anchor="middle", class_="axis-name"))
    keys = legend([_key(state, style) for state, style in styles.items()])
    return figure(parts, keys, title=title, alt=alt, size=(WIDTH, bottom + 56))


def _bar(span: Span, style: Style, left: float, right: float, foot: float) -> Markup:
    height = style.height * _STRIP
    place = {"x": left, "y": foot - height, "width": max(right - left - 1, 2), "height": height}
    return tag("rect", tag("title", span.title or span.state), **place, class_=style)


def _key(state: str, style: Style) -> Key:
    height = 12 * style.height
    return Key(swatch(tag("rect", x=3, y=13 - height, width=30, height=height, class_=style)), state)
