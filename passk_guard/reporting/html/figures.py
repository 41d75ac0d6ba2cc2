"""Figures as plotly reads them, JSON of `data` and `layout`: panels over one axis, curves with bands, heat maps."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from passk_guard.reporting.html.text import is_number, label

# Okabe and Ito's colours, which people with any colour vision tell apart; page.js has their lighter ones for the dark.
BLUE, VERMILLION, GREEN, PURPLE, OCHRE, GREY = COLOURS = (
    "#0072b2", "#d55e00", "#007a59", "#a8558a", "#b37a00", "#4a5560",
)  # fmt: skip
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
_PANEL, _GAP, _TOP, _BOTTOM = 132, 44, 36, 44  # pixels
_LARGEST = 250  # rows and columns of a heat map; more are averaged
Trace = dict[str, Any]
Column = Sequence[float | None]


@dataclass(frozen=True)
class Figure:
    """One figure of a page.

    Attributes:
        title: above it, text. alt: what it shows, for those who do not see it: say the numbers that matter.
        data, layout: as plotly reads them, in its light colours; texts in them have gone through `label`.
        height: in pixels. note: beneath it, text. square: as wide as it is high.
    """

    title: str
    alt: str
    data: list[Trace]
    layout: dict[str, Any]
    height: int = 340
    note: str = ""
    square: bool = False

    @property
    def json(self) -> Markup:
        """The figure for a data block of a page: no `<` that could end the block."""
        whole = {"data": self.data, "layout": self.layout | {"height": self.height}}
        return Markup(json.dumps(whole, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


@dataclass(frozen=True)
class Panel:
    """One of several plots above each other over the same x axis.

    Attributes:
        title: text above it.
        traces: of plotly, without axes.
        levels: (y, name) of horizontal lines, e.g. a threshold.
        axis: more settings of its y axis. height: in pixels.
        empty: why there is nothing in it, written where the curves would be; text.
    """

    title: str
    traces: Sequence[Trace]
    levels: Sequence[tuple[float, str]] = ()
    axis: dict[str, Any] = field(default_factory=dict)
    height: int = _PANEL
    empty: str = ""


def stacked(
    panels: Sequence[Panel], *, title: str, alt: str, x_title: str, note: str = "", shapes: Iterable[Any] = (), **x: Any
) -> Figure:
    """Panels above each other, with one crosshair and one list of values for all.

    Args:
        title, alt, note: as in `Figure`. x_title: at the common axis. x: more settings of that axis.
        shapes: behind all panels.
    """
    # One x axis for all, and not one each that match: only traces of the same axis share a list of values.
    height = _TOP + sum(panel.height for panel in panels) + _GAP * (len(panels) - 1) + _BOTTOM
    plot, below = height - _TOP - _BOTTOM, 0
    layout: dict[str, Any] = {
        "margin": {"l": 56, "r": 12, "t": _TOP, "b": _BOTTOM},
        "hovermode": "x unified",
        "hoversubplots": "axis",
        "showlegend": False,
        "xaxis": {"title": {"text": x_title, "standoff": 8}, "anchor": f"y{len(panels)}", "showspikes": True}
        | {"spikemode": "across", "spikethickness": 1, "spikedash": "dot", "spikecolor": GREY, "zeroline": False}
        | x,
        "shapes": list(shapes),
        "annotations": [],
    }
    data = []
    for number, panel in enumerate(panels, 1):
        top = 1 - below / plot
        bottom = 1 - (below + panel.height) / plot
        below += panel.height + _GAP
        axis = {"domain": [max(0.0, bottom), top], "zeroline": False, "nticks": 5} | panel.axis
        layout["yaxis" if number == 1 else f"yaxis{number}"] = axis
        at = {"xref": "paper", "showarrow": False}
        head = {"text": f"<b>{label(panel.title)}</b>", "x": 0, "xanchor": "left", "xshift": -48}
        layout["annotations"].append(at | head | {"y": top, "yref": "paper", "yanchor": "bottom", "yshift": 6})
        if panel.empty:
            middle = {"x": 0.5, "y": (top + bottom) / 2, "yref": "paper", "text": label(panel.empty)}
            layout["annotations"].append(at | middle)
        for y, name in panel.levels:
            line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": f"y{number}", "y0": y, "y1": y}
            layout["shapes"].append(line | {"line": {"color": GREY, "width": 1, "dash": "dash"}})
            beside = {
                "x": 1,
                "y": y,
                "yref": f"y{number}",
                "xanchor": "right",
                "yanchor": "bottom",
                "text": label(name),
            }
            log = panel.axis.get("type") == "log"  # annotations of a logarithmic axis are placed by the exponent
            layout["annotations"].append(at | beside | {"y": math.log10(y) if log else y, "font": {"size": 11}})
        data += [trace | {"xaxis": "x", "yaxis": f"y{number}"} for trace in panel.traces]
    return Figure(title, alt, data, layout, height, note)


def curve(name: str, x: Column, y: Column, colour: str, dash: str = "solid", **more: Any) -> Trace:
    """A line through the points, broken where y is unknown. `name` is text; the hover shows it with three decimals."""
    line = {"color": colour, "dash": dash, "width": 2}
    found = {"type": "scatter", "mode": "lines+markers", "name": label(name), "x": list(x), "y": known(y)}
    return found | {"line": line, "marker": {"color": colour, "size": 5}, "yhoverformat": ".3f"} | more


def dots(name: str, x: Column, y: Column, error: Column, colour: str, symbol: str = "circle", **more: Any) -> Trace:
    """Single points with error bars: `y` plus and minus `error`."""
    bars = {
        "type": "data",
        "array": [float(f"{e:.2g}") if is_number(e) else None for e in error],
        "thickness": 1,
        "width": 2,
        "color": colour,
    }
    marker = {"color": colour, "symbol": f"{symbol}-open", "size": 7}
    found = {"type": "scatter", "mode": "markers", "name": label(name), "x": list(x), "y": known(y)}
    return found | {"error_y": bars, "marker": marker, "opacity": 0.75, "yhoverformat": ".3f"} | more


def band(x: Column, low: Column, high: Column, colour: str, opacity: float = 0.18, **more: Any) -> Trace:
    """The area between two curves, broken where either is unknown; an interval without a neighbour is a thick line."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for part in stretches([is_number(a) and is_number(b) for a, b in zip(low, high, strict=True)]):
        around = [*part, *reversed(part), part[0]]
        xs += [*(x[i] for i in around), None]
        ys += [*(high[i] for i in part), *(low[i] for i in reversed(part)), high[part[0]], None]
    return area(xs, ys, colour, opacity, **more)


def area(x: Column, y: Column, colour: str, opacity: float = 0.18, **more: Any) -> Trace:
    """Filled polygons, separated by None, which take no part in the hover."""
    line = {"color": colour, "width": 1}
    found = {"type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "fill": "toself", "fillcolor": colour}
    return found | {"line": line, "opacity": opacity, "hoverinfo": "skip", "showlegend": False} | more


def boxes(
    spans: Iterable[tuple[float, float]], low: float, high: float
) -> tuple[list[float | None], list[float | None]]:
    """Corners of rectangles over these spans of x, for `area`."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for start, end in spans:
        xs += [start, end, end, start, start, None]
        ys += [low, low, high, high, low, None]
    return xs, ys


def known(values: Column) -> list[float | None]:
    """The numbers that can be drawn; None else."""
    return [value if is_number(value) else None for value in values]


def stretches(defined: Sequence[bool]) -> list[range]:
    """Maximal stretches of consecutive True."""
    groups = (list(group) for here, group in groupby(range(len(defined)), lambda i: defined[i]) if here)
    return [range(group[0], group[-1] + 1) for group in groups]


def heat_map(matrix: Tensor, names: Sequence[str], *, title: str, alt: str, side: str, note: str = "") -> Figure:
    """A signed square matrix, vermillion below zero and blue above; a cell that is pointed at names its two prompts.

    Args:
        matrix: [m, m] real numbers, m >= 1; NaN is left blank.
        names: [m] texts of the rows, which are those of the columns.
        side: text at both axes.
    """
    small, block = averaged_down(matrix, _LARGEST)
    limit, size = colour_limit(small), len(small)
    # Categories are told apart by their number.
    rows = [f"{i * block + 1}{'' if block == 1 else ' and on'}: {label(names[i * block], 60)}" for i in range(size)]
    ticks: Trace = {"tickmode": "array", "tickvals": (places := list(range(0, size, max(1, math.ceil(size / 6)))))}
    ticks |= {"ticktext": [str(i * block + 1) for i in places], "type": "category", "showgrid": False}
    clear_v, clear_b = "rgba(213,94,0,0)", "rgba(0,114,178,0)"
    scale = [[0, VERMILLION], [0.5, clear_v], [0.5, clear_b], [1, BLUE]]
    cells = {"dtype": "f4", "bdata": base64.b64encode(small.float().numpy().tobytes()).decode()}
    data: Trace = {"type": "heatmap", "z": cells | {"shape": f"{size}, {size}"}, "x": rows, "y": rows}
    data |= {"zmin": -limit, "zmax": limit, "zhoverformat": ".3g", "colorscale": scale}
    data |= {"hoverongaps": False, "colorbar": {"thickness": 14}}
    data |= {"hovertemplate": "%{y}<br>%{x}<br>%{z}<extra></extra>"}
    remarks = [note, "Vermillion: below zero, blue: above."]
    if block > 1:
        remarks.append(f"Each cell is the mean of {block} x {block} entries.")
    if beyond := float((small.abs() > limit).double().mean()):
        remarks.append(f"Colours are full from {limit:.3g} on; {100 * beyond:.2g}% of the cells lie beyond.")
    layout = {
        "margin": {"l": 60, "r": 10, "t": 10, "b": 50},
        "xaxis": ticks | {"title": {"text": label(side)}, "constrain": "domain"},
        "yaxis": ticks
        | {"title": {"text": label(side)}, "autorange": "reversed", "scaleanchor": "x", "constrain": "domain"},
    }
    return Figure(title, alt, [data], layout, 480, " ".join(filter(None, remarks)), square=True)


def colour_limit(matrix: Tensor, share: float = 0.98) -> float:
    """The |value| below which this share of the entries off the diagonal lies: a few large ones do not set the scale.

    Entries that are zero or not finite do not count (prompts without signal have a zero kernel); 1 if none is left.
    """
    values = matrix.detach().to("cpu", torch.float64)
    if values.shape[0] == values.shape[1]:
        values = values[~torch.eye(values.shape[0], dtype=torch.bool)]
    values = values[values.isfinite() & (values != 0)].abs()
    if values.numel() == 0:
        return 1.0
    # torch.quantile refuses more than 16M entries.
    return float(values.flatten().kthvalue(max(1, math.ceil(share * values.numel()))).values)


def averaged_down(matrix: Tensor, size: int) -> tuple[Tensor, int]:
    """Means of square blocks, so that neither side has more than `size` entries.

    NaN are left out of the means; a block of NaN only is NaN. Blocks at the far ends may be smaller.

    Returns:
        The smaller matrix, float64, and the side of a block.
    """
    values = matrix.detach().to("cpu", torch.float64)
    block = max(1, math.ceil(max(values.shape) / size))
    if block == 1:
        return values, 1
    rows, columns = (math.ceil(side / block) for side in values.shape)
    padded = torch.full((rows * block, columns * block), math.nan, dtype=torch.float64)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded.reshape(rows, block, columns, block).nanmean(dim=(1, 3)), block


def angle_over_k(ks: Sequence[int], cosine: Column, bands: Sequence[tuple[Column, Column, str]], **told: Any) -> Figure:
    """cos(grad J_k, grad J_1) over k.

    Args:
        ks, cosine: [K] of the curve.
        bands: (low, high, name), the widest first.
        told: `title`, `alt` and `note` as in `Figure`; `threshold`; `k_star`, or None for no mark; `established`, [K]
            flags of a conflict, which makes a point vermillion.
    """
    gaps = [k for k, value in zip(ks, cosine, strict=True) if not is_number(value)]
    note = [told["note"], f"Not determined at k = {gaps[0]:g}{' and others' if gaps[1:] else ''}." if gaps else ""]
    marker = {"color": [VERMILLION if found else BLUE for found in told["established"]], "size": 7}
    areas = []
    for i, (low, high, name) in enumerate(bands):  # without a cosine the band is all that is possible
        shown = [end if is_number(value) else None for end, value in zip(low, cosine, strict=True)]
        areas.append(band(ks, shown, high, BLUE, 0.1 + 0.12 * i, showlegend=True, name=label(name)))
    across = {"xref": "paper", "x0": 0, "x1": 1, "yref": "y"}
    lines = [across | {"y0": told["threshold"], "y1": told["threshold"]}]
    if told["k_star"] is not None:
        lines.append({"yref": "paper", "y0": 0, "y1": 1, "xref": "x", "x0": told["k_star"], "x1": told["k_star"]})
    style = {"type": "line", "line": {"color": GREY, "width": 1, "dash": "dash"}}
    layout = over_k(ks, "cosine") | {"shapes": [style | line for line in lines]}
    layout["yaxis"] |= {"range": [-1.05, 1.05], "zeroline": False}
    data = [*areas, curve("cosine", ks, cosine, BLUE, marker=marker, showlegend=False)]
    return Figure(told["title"], told["alt"], data, layout, note=" ".join(filter(None, note)))


def over_k(ks: Sequence[int], y_title: str) -> dict[str, Any]:
    """The layout of a plot over k, on a logarithmic axis labelled at some of these k."""
    most = max(ks, default=1)
    ticks = [k for k in ks if math.log2(k).is_integer()] or list(ks)
    if most > 1.4 * max(ticks, default=1):
        ticks.append(most)
    layout = plain("k", y_title) | {"hovermode": "x unified"}
    layout["xaxis"] |= {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": [f"{k:g}" for k in ticks]}
    return layout


def plain(x_title: str, y_title: str) -> dict[str, Any]:
    """The layout of a single plot."""
    return {
        "margin": {"l": 56, "r": 12, "t": 10, "b": 44},
        "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0},
        "xaxis": {"title": {"text": label(x_title)}, "zeroline": False},
        "yaxis": {"title": {"text": label(y_title)}},
    }
