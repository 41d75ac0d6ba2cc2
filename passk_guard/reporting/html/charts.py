"""Line charts, scatter plots and histograms as inline SVG, told apart by colour and by dashes or shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from passk_guard.reporting.html import frame
from passk_guard.reporting.html.axes import Axis, is_number, make_axis, padded, write_number
from passk_guard.reporting.html.frame import BOTTOM, LEFT, RIGHT, TOP, Key, Level, Upright, classes, dot, swatch, tag

_DOTS_UP_TO = 60  # points of a curve; beyond, single points only where the curve is broken on both sides
_LABELLED_UP_TO = 3000
_BINS = 30


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


@dataclass(frozen=True)
class Distribution:
    """Values, each counted once; those that are None or NaN are left out."""

    name: str
    values: Sequence[float | None]

    @property
    def known(self) -> list[float]:
        """The values there are."""
        return [v for v in self.values if is_number(v)]


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
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Markup:
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
        x_ticks: labelled values instead of round whole numbers.
        x_range, y_range: fixed ends; what lies outside is set on the border.
    """
    xs = [v for s in series for v in s.x] + [v for b in bands for v in b.x] + [m.x for m in markers]
    ys = [v for s in series for v in s.y] + [v for b in bands for v in (*b.low, *b.high)] + [m.y for m in levels]
    x = make_axis(xs, LEFT, RIGHT, bounds=x_range, ticks=x_ticks, log=x_log, whole=True)
    y = make_axis(ys, BOTTOM, TOP, bounds=y_range or padded(ys))
    curves = [(s, i if s.colour is None else s.colour, i if s.dash is None else s.dash) for i, s in enumerate(series)]
    content = [
        *(part for band in bands for part in _band(band, x, y)),
        *frame.horizontal_lines(levels, y),
        *frame.vertical_lines(markers, x),
        *(part for curve in curves for part in _curve(*curve, x, y)),
    ]
    keys = [_curve_key(s.name, colour, dash) for s, colour, dash in curves] + [_band_key(band) for band in bands]
    keys += frame.mark_keys(markers, levels)
    return frame.chart(x, y, content, keys, x_label=x_label, y_label=y_label, title=title, alt=alt)


def scatter(
    points: Sequence[Points],
    *,
    x_label: str,
    y_label: str,
    alt: str,
    title: str = "",
    levels: Sequence[Level] = (),
    x_range: tuple[float, float] | None = None,
) -> Markup:
    """Clouds of points; pairs with a None or NaN are left out. Arguments as in `line_chart`."""
    xs = [v for p in points for v in p.x]
    ys = [v for p in points for v in p.y] + [m.y for m in levels]
    x = make_axis(xs, LEFT, RIGHT, bounds=x_range or padded(xs, 0.03))
    y = make_axis(ys, BOTTOM, TOP, bounds=padded(ys))
    clouds = [part for i, p in enumerate(points) for part in _cloud(p, i, x, y)]
    content = [*frame.horizontal_lines(levels, y), *clouds]
    keys = [*(_cloud_key(p.name, i) for i, p in enumerate(points)), *frame.mark_keys((), levels)]
    return frame.chart(x, y, content, keys, x_label=x_label, y_label=y_label, title=title, alt=alt)


def histogram(
    distributions: Sequence[Distribution],
    markers: Sequence[Upright] = (),
    *,
    x_label: str,
    alt: str,
    y_label: str = "share",
    title: str = "",
    bins: int = _BINS,
    x_range: tuple[float, float] | None = None,
) -> Markup:
    """Shares per bin: the first distribution as bars, further ones as outlines, the mean of each as a vertical line.

    Args:
        distributions: drawn over each other in one set of bins of equal width.
        alt: what the picture shows; the means are added to it.
        x_range: fixed ends; values outside are counted in the outermost bins.
    """
    values = [v for d in distributions for v in d.known]
    x = make_axis([*values, *(m.x for m in markers)], LEFT, RIGHT, bounds=x_range or padded(values, 0.02))
    shares = [_shares(d.known, x, bins) for d in distributions]
    tallest = max((s for row in shares for s in row), default=0.0) or 1.0
    y = make_axis([], BOTTOM, TOP, bounds=(0.0, 1.08 * tallest))
    means = [_mean(d.name, known, i) for i, d in enumerate(distributions) if (known := d.known)]
    marks = [*means, *markers]
    content = [part for i, row in enumerate(shares) for part in _bars(row, i, x, y)] + frame.vertical_lines(marks, x)
    keys = [*(_bars_key(d.name, i) for i, d in enumerate(distributions)), *frame.mark_keys(marks, ())]
    spoken = ". ".join([alt.rstrip("."), *(mark.label for mark in means)])
    return frame.chart(x, y, content, keys, x_label=x_label, y_label=y_label, title=title, alt=spoken)


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


def _curve(series: Series, colour: int, dash: int, x: Axis, y: Axis) -> list[Markup]:
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


def _band(band: Band, x: Axis, y: Axis) -> list[Markup]:
    parts = []
    for run in runs([is_number(a) and is_number(b) for a, b in zip(band.low, band.high, strict=True)]):
        up = [f"{x.at(band.x[i]):g} {y.at(band.high[i] or 0.0):g}" for i in run]
        down = [f"{x.at(band.x[i]):g} {y.at(band.low[i] or 0.0):g}" for i in reversed(run)]
        name = "band" if len(run) > 1 else "band thin"  # a single interval has no area: it is an error bar
        parts.append(tag("path", d=f"M{'L'.join(up + down)}Z", class_=classes(name, colour=band.colour)))
    return parts


def _cloud(points: Points, number: int, x: Axis, y: Axis) -> list[Markup]:
    style = classes("dot", "solid", "faint", colour=number)
    labels = points.labels if len(points.x) <= _LABELLED_UP_TO else ()
    return [
        dot(x.at(a), y.at(b), number, style, labels[i] if i < len(labels) else "")
        for i, (a, b) in enumerate(zip(points.x, points.y, strict=True))
        if is_number(a) and is_number(b)
    ]


def _curve_key(name: str, colour: int, dash: int) -> Key:
    line = tag("path", d="M1 7H35", class_=classes("curve", colour=colour, dash=dash))
    return Key(swatch(line, dot(18, 7, dash, classes("dot", colour=colour))), name)


def _band_key(band: Band) -> Key:
    area = tag("rect", x=1, y=1, width=34, height=12, class_=classes("band", colour=band.colour))
    return Key(swatch(area), band.name)


def _cloud_key(name: str, number: int) -> Key:
    return Key(swatch(dot(18, 7, number, classes("dot", "solid", "faint", colour=number))), name)


def _shares(values: Sequence[float], x: Axis, bins: int) -> list[float]:
    shares = [0.0] * bins
    for value in values:
        place = (value - x.low) / (x.high - x.low) * bins
        shares[min(max(math.floor(place), 0), bins - 1)] += 1 / len(values)
    return shares


def _mean(name: str, values: Sequence[float], number: int) -> Upright:
    mean = math.fsum(v / len(values) for v in values)
    return Upright(mean, f"mean, {name}: {write_number(mean)}", colour=number, dash=number)


def _bars(row: Sequence[float], number: int, x: Axis, y: Axis) -> list[Markup]:
    edges = [x.start + (x.end - x.start) * i / len(row) for i in range(len(row) + 1)]
    steps = "".join(f"V{y.at(share):g}H{right:.1f}" for share, right in zip(row, edges[1:], strict=True))
    outline = f"M{edges[0]:.1f} {y.start:g}{steps}V{y.start:g}"
    parts = [tag("path", d=outline, class_=classes("curve", colour=number, dash=number))]
    return [tag("path", d=outline + "Z", class_=classes("bar", colour=number)), *parts] if number == 0 else parts


def _bars_key(name: str, number: int) -> Key:
    shape = tag("path", d="M2 13V4H34V13", class_=classes("curve", colour=number, dash=number))
    fill = tag("path", d="M2 13V4H34V13Z", class_=classes("bar", colour=number))
    return Key(swatch(*((fill, shape) if number == 0 else (shape,))), name)
