"""Histograms over each other, each with its mean marked."""

from __future__ import annotations

import math
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
    Upright,
    chart,
    classes,
    mark_keys,
    swatch,
    uprights,
)


@dataclass(frozen=True)
class Distribution:
    """Values, each counted once or with its own weight >= 0; those that are None or NaN are left out."""

    name: str
    values: Sequence[float | None]
    weights: Sequence[float] | None = None

    def pairs(self) -> list[tuple[float, float]]:
        """(value, share) of every value there is; the shares sum to 1 unless all weights are 0."""
        weights = self.weights if self.weights is not None else [1.0] * len(self.values)
        kept = [(v, w) for v, w in zip(self.values, weights, strict=True) if v is not None and is_number(v)]
        total = math.fsum(w for _, w in kept) or 1.0
        return [(v, w / total) for v, w in kept]

    def mean(self) -> float | None:
        """Weighted mean, None without values."""
        pairs = self.pairs()
        return math.fsum(v * share for v, share in pairs) if pairs else None


def histogram(
    distributions: Sequence[Distribution],
    markers: Sequence[Upright] = (),
    *,
    x_label: str,
    alt: str,
    y_label: str = "share",
    title: str = "",
    bins: int = 30,
    x_range: tuple[float, float] | None = None,
) -> Html:
    """Shares per bin: the first distribution as bars, further ones as outlines, the mean of each as a vertical line.

    Args:
        distributions: drawn over each other in one set of bins.
        markers: further vertical lines, e.g. at 0.
        x_label, y_label: texts at the axes.
        alt: what the picture shows; the means are added to it.
        title: above the picture.
        bins: of equal width.
        x_range: fixed ends; values outside are counted in the outermost bins.
    """
    values = [v for d in distributions for v, _ in d.pairs()]
    x = make_axis([*values, *(m.x for m in markers)], LEFT, RIGHT, bounds=x_range or padded(values, 0.02))
    shares = [_shares(d, x, bins) for d in distributions]
    y = make_axis([0.0, *(s for row in shares for s in row)], BOTTOM, TOP, bounds=(0.0, 1.08 * _top(shares)))
    marks = [*_means(distributions), *markers]
    content = [part for i, row in enumerate(shares) for part in _drawn(row, i, x, y)] + uprights(marks, x)
    keys = [*(_key(d.name, i) for i, d in enumerate(distributions)), *mark_keys(marks, ())]
    spoken = ". ".join([alt.rstrip("."), *(mark.label for mark in _means(distributions))])
    return chart(x, y, content, keys, x_label=x_label, y_label=y_label, title=title, alt=spoken)


def _shares(distribution: Distribution, x: Axis, bins: int) -> list[float]:
    shares = [0.0] * bins
    for value, share in distribution.pairs():
        place = (value - x.low) / (x.high - x.low) * bins
        shares[min(max(math.floor(place), 0), bins - 1)] += share
    return shares


def _top(shares: Sequence[Sequence[float]]) -> float:
    return max((s for row in shares for s in row), default=0.0) or 1.0


def _means(distributions: Sequence[Distribution]) -> list[Upright]:
    means = [(i, d.name, d.mean()) for i, d in enumerate(distributions)]
    return [
        Upright(mean, f"mean, {name}: {write_number(mean)}", colour=i, dash=i)
        for i, name, mean in means
        if mean is not None
    ]


def _drawn(row: Sequence[float], number: int, x: Axis, y: Axis) -> list[Html]:
    edges = [x.start + (x.end - x.start) * i / len(row) for i in range(len(row) + 1)]
    heights = [y.at(share) for share in row]
    steps = "".join(f"V{h:g}H{right:.1f}" for h, right in zip(heights, edges[1:], strict=True))
    outline = f"M{edges[0]:.1f} {y.start:g}{steps}V{y.start:g}"
    parts = [tag("path", d=outline, class_=classes("curve", colour=number, dash=number))]
    return [tag("path", d=outline + "Z", class_=classes("bar", colour=number)), *parts] if number == 0 else parts


def _key(name: str, number: int) -> Key:
    shape = tag("path", d="M2 13V4H34V13", class_=classes("curve", colour=number, dash=number))
    fill = tag("path", d="M2 13V4H34V13Z", class_=classes("bar", colour=number))
    return Key(swatch(*((fill, shape) if number == 0 else (shape,))), name)
