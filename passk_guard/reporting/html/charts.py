"""Line charts and scatter plots as inline SVG, told apart by colour and by dashes or shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from passk_guard.reporting.html.axes import Axis, is_number, make_axis, padded, write_number
from passk_guard.reporting.html.elements import Html, tag
from passk_guard.reporting.html.frame import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Key,
    Level,
    Upright,
    chart,
    classes,
    dot,
    levels,
    mark_keys,
    swatch,
    uprights,
)

_DOTS_UP_TO = 60  # points of a curve; beyond, single points only where the curve is broken on both sides
_LABELLED_UP_TO = 3000


@dataclass(frozen=True)
class Series:
    """A curve through (x, y); it is broken where y is None or NaN, and a point between two breaks is a dot.

    Attributes:
        colour, dash: 0..5 and 0..3; by default the place in the list of series.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int | None = None
    dash: int | None = None


@dataclass(frozen=True)
class Band:
    """The area between `low` and `high`, e.g. an interval; broken where either is None or NaN."""

    x: Sequence[float]
    low: Sequence[float | None]
    high: Sequence[float | None]
    name: str = ""
    colour: int = 0


@dataclass(frozen=True)
class Points:
    """A cloud of points; `labels`, one a point, show when it is pointed at."""

    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    labels: Sequence[str] = ()
    colour: int | None = None
    shape: int | None = None


def line_chart(
    series: Sequence[Series],
    bands: Sequence[Band] = (),
    markers: Sequence[Upright] = (),
    *,
    x_label: str,
    y_label: str,
    alt: str,
    title: str = "",
    levels: Sequence[Level] = (),
    x_log: bool = False,
    x_ticks: Sequence[float] | None = None,
    x_whole: bool = True,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Html:
    """Curves with confidence bands over one x axis.

    Args:
        series: drawn in order.
        bands: drawn beneath the curves.
        markers: vertical lines, e.g. alerts or k*.
        x_label, y_label: texts at the axes.
        alt: what the picture shows, for those who do not see it: say the numbers that matter.
        title: above the picture.
        levels: horizontal lines, e.g. a threshold; the y axis is stretched to hold them.
        x_log: base-2 logarithmic x axis, for curves over k.
        x_ticks: labelled values instead of round ones; `x_whole`: round ones are whole numbers.
        x_range, y_range: fixed ends; what lies outside is set on the border.
    """
    xs = [v for s in series for v in s.x] + [v for b in bands for v in b.x] + [m.x for m in markers]
    ys = [v for s in series for v in s.y] + [v for b in bands for v in (*b.low, *b.high)] + [m.y for m in levels]
    x = make_axis(xs, LEFT, RIGHT, bounds=x_range, ticks=x_ticks, log=x_log, whole=x_whole)
    y = make_axis(ys, BOTTOM, TOP, bounds=y_range or padded(ys))
    curves = [(s, _place(s.colour, i), _place(s.dash, i)) for i, s in enumerate(series)]
    content = [
        *(part for band in bands for part in _band(band, x, y)),
        *_levels(levels, y),
        *uprights(markers, x),
        *(part for curve in curves for part in _curve(*curve, x, y)),
    ]
    keys = [
        *(_curve_key(s.name, colour, dash) for s, colour, dash in curves),
        *(_band_key(band) for band in bands),
        *mark_keys(markers, levels),
    ]
    return chart(x, y, content, keys, x_label=x_label, y_label=y_label, title=title, alt=alt)


def scatter(
    points: Sequence[Points],
    markers: Sequence[Upright] = (),
    *,
    x_label: str,
    y_label: str,
    alt: str,
    title: str = "",
    levels: Sequence[Level] = (),
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Html:
    """Clouds of points; pairs with a None or NaN are left out. Arguments as in `line_chart`."""
    xs = [v for p in points for v in p.x] + [m.x for m in markers]
    ys = [v for p in points for v in p.y] + [m.y for m in levels]
    x = make_axis(xs, LEFT, RIGHT, bounds=x_range or padded(xs, 0.03))
    y = make_axis(ys, BOTTOM, TOP, bounds=y_range or padded(ys))
    clouds = [(p, _place(p.colour, i), _place(p.shape, i)) for i, p in enumerate(points)]
    content = [*_levels(levels, y), *uprights(markers, x), *(d for c in clouds for d in _cloud(*c, x, y))]
    keys = [*(_cloud_key(p.name, colour, shape) for p, colour, shape in clouds), *mark_keys(markers, levels)]
    return chart(x, y, content, keys, x_label=x_label, y_label=y_label, title=title, alt=alt)


def runs(defined: Sequence[bool]) -> list[range]:
    """Maximal stretches of consecutive True."""
    found, start = [], None
    for i, here in enumerate([*defined, False]):
        if here and start is None:
            start = i
        elif not here and start is not None:
            found.append(range(start, i))
            start = None
    return found


def _place(chosen: int | None, position: int) -> int:
    return position if chosen is None else chosen


_levels = levels  # the parameter of the same name reads better at the call


def _curve(series: Series, colour: int, dash: int, x: Axis, y: Axis) -> list[Html]:
    parts = []
    for run in runs([is_number(v) for v in series.y]):
        at = [(x.at(series.x[i]), y.at(series.y[i] or 0.0)) for i in run]
        if len(run) > 1:
            path = "M" + "L".join(f"{a:g} {b:g}" for a, b in at)
            parts.append(tag("path", d=path, class_=classes("curve", colour=colour, dash=dash)))
        if len(run) == 1 or len(series.x) <= _DOTS_UP_TO:
            texts = [f"{series.name}: {write_number(series.y[i])} at {write_number(series.x[i])}" for i in run]
            # Dashes are for lines: a dot's outline is whole, its shape tells the series.
            style = classes("dot", colour=colour)
            parts += [dot(a, b, dash, style, text) for (a, b), text in zip(at, texts, strict=True)]
    return parts


def _band(band: Band, x: Axis, y: Axis) -> list[Html]:
    parts = []
    for run in runs([is_number(a) and is_number(b) for a, b in zip(band.low, band.high, strict=True)]):
        up = [f"{x.at(band.x[i]):g} {y.at(band.high[i] or 0.0):g}" for i in run]
        down = [f"{x.at(band.x[i]):g} {y.at(band.low[i] or 0.0):g}" for i in reversed(run)]
        name = "band" if len(run) > 1 else "band thin"  # a single interval has no area: it is an error bar
        parts.append(tag("path", d=f"M{'L'.join(up + down)}Z", class_=classes(name, colour=band.colour)))
    return parts


def _cloud(points: Points, colour: int, shape: int, x: Axis, y: Axis) -> list[Html]:
    style = classes("dot", "solid", "faint", colour=colour)
    labels = points.labels if len(points.x) <= _LABELLED_UP_TO else ()
    return [
        dot(x.at(a or 0.0), y.at(b or 0.0), shape, style, labels[i] if i < len(labels) else "")
        for i, (a, b) in enumerate(zip(points.x, points.y, strict=True))
        if is_number(a) and is_number(b)
    ]


def _curve_key(name: str, colour: int, dash: int) -> Key:
    line = tag("path", d="M1 7H35", class_=classes("curve", colour=colour, dash=dash))
    return Key(swatch(line, dot(18, 7, dash, classes("dot", colour=colour))), name)


def _band_key(band: Band) -> Key:
    return Key(
        swatch(tag("rect", x=1, y=1, width=34, height=12, class_=classes("band", colour=band.colour))), band.name
    )


def _cloud_key(name: str, colour: int, shape: int) -> Key:
    return Key(swatch(dot(18, 7, shape, classes("dot", "solid", "faint", colour=colour))), name)
