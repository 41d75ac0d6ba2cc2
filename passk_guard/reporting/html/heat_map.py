"""A signed matrix, e.g. the prompt kernel, as a heat map that reads at 20 rows and at 1,000."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import torch
from torch import Tensor

from passk_guard.reporting.html.axes import round_ticks, write_number
from passk_guard.reporting.html.elements import Html, join, tag
from passk_guard.reporting.html.frame import figure
from passk_guard.reporting.pixels import averaged_down, colour_limit, encode_png, signed_pixels
from passk_guard.utils.errors import GuardError

_LARGEST = 400  # rows and columns that are drawn one by one; more are averaged
_WIDTH, _SIDE, _LEFT, _TOP = 640, 400, 96, 12


def heat_map(
    matrix: Tensor | Sequence[Sequence[float]],
    *,
    alt: str,
    title: str = "",
    x_label: str = "prompt",
    y_label: str = "prompt",
    limit: float | None = None,
    boundaries: Sequence[int] = (),
    caption: str = "",
) -> Html:
    """Rows downwards, columns to the right, in colours around zero with a colour bar.

    Args:
        matrix: [rows, columns] real numbers; NaN is grey.
        alt: what the picture shows, for those who do not see it.
        title: above the picture; `x_label`, `y_label`: beneath and beside it; `caption`: further text beneath.
        limit: |value| of the full colours; by default the 98% quantile of |value| off the diagonal of what is drawn.
        boundaries: row numbers (and columns, of a square matrix) before which a group begins, marked by lines.

    Raises:
        GuardError: not a matrix, or one without entries.
    """
    values = torch.as_tensor(matrix, dtype=torch.float64)
    if values.ndim != 2 or values.numel() == 0:
        raise GuardError(f"Expected `matrix` of shape [rows, columns], both >= 1; found {list(values.shape)}.")
    small, block = averaged_down(values, _LARGEST)
    top = limit or colour_limit(small)
    picture = tag(
        "svg",
        tag("title", title or alt),
        tag("desc", alt),
        _image(signed_pixels(small, top), _LEFT, _TOP, _SIDE, _SIDE, crisp=max(small.shape) <= 200),
        _lines(boundaries, values.shape),
        tag("rect", x=_LEFT, y=_TOP, width=_SIDE, height=_SIDE, class_="frame"),
        _ticks(values.shape),
        tag("text", x_label, x=_LEFT + _SIDE / 2, y=_TOP + _SIDE + 48, text_anchor="middle", class_="axis-name"),
        tag(
            "text",
            y_label,
            text_anchor="middle",
            class_="axis-name",
            transform=f"translate(18 {_TOP + _SIDE / 2}) rotate(-90)",
        ),
        _colour_bar(top),
        class_="chart",
        viewBox=f"0 0 {_WIDTH} {_TOP + _SIDE + 56}",
        role="img",
        aria_label=f"{title}: {alt}" if title else alt,
    )
    return figure(title, picture, tag("div", " ".join(_remarks(small, top, block, caption)), class_="note"))


def _remarks(values: Tensor, top: float, block: int, caption: str) -> list[str]:
    remarks = [caption] if caption else []
    remarks.append("Vermillion: below zero, blue: above.")
    if block > 1:
        remarks.append(f"Each cell is the mean of {block} x {block} entries.")
    beyond = float((values.abs() > top).double().mean())
    if beyond:
        remarks.append(f"Colours are full from {write_number(top)} on; {100 * beyond:.2g}% of the cells lie beyond.")
    if bool(values.isnan().any()):
        remarks.append("Grey: no value.")
    return remarks


def _image(pixels: Tensor, x: float, y: float, width: float, height: float, *, crisp: bool) -> Html:
    data = base64.b64encode(encode_png(pixels)).decode()
    return tag(
        "image",
        x=x,
        y=y,
        width=width,
        height=height,
        preserveAspectRatio="none",
        class_="crisp" if crisp else None,
        href=f"data:image/png;base64,{data}",
    )


def _ticks(shape: torch.Size) -> Html:
    """Numbers of rows and columns, from 1, at the middle of their cells."""
    parts = []
    for number, value in enumerate(_numbers(shape[1])):
        at, class_ = round(_LEFT + (value - 0.5) / shape[1] * _SIDE, 1), "tick second" if number % 2 else "tick"
        parts.append(tag("text", value, x=at, y=_TOP + _SIDE + 22, text_anchor="middle", class_=class_))
    for value in _numbers(shape[0]):
        at = round(_TOP + (value - 0.5) / shape[0] * _SIDE + 5, 1)
        parts.append(tag("text", value, x=_LEFT - 8, y=at, text_anchor="end", class_="tick"))
    return join(parts)


def _numbers(count: int) -> list[int]:
    return [1, *(int(tick) for tick in round_ticks(0, count, 6, whole=True) if tick > count / 20 and tick > 1)]


def _lines(boundaries: Sequence[int], shape: torch.Size) -> Html:
    rows = [round(_TOP + b / shape[0] * _SIDE, 1) for b in boundaries if 0 < b < shape[0]]
    parts = [tag("line", x1=_LEFT, x2=_LEFT + _SIDE, y1=at, y2=at, class_="edge") for at in rows]
    if shape[0] == shape[1]:
        columns = [round(_LEFT + b / shape[1] * _SIDE, 1) for b in boundaries if 0 < b < shape[1]]
        parts += [tag("line", x1=at, x2=at, y1=_TOP, y2=_TOP + _SIDE, class_="edge") for at in columns]
    return join(parts)


def _colour_bar(top: float) -> Html:
    x, width = _LEFT + _SIDE + 14, 16
    bar = _image(signed_pixels(torch.linspace(top, -top, 101)[:, None], top), x, _TOP, width, _SIDE, crisp=False)
    labels = [
        tag("text", f"{value:.3g}".replace("-", "−"), x=x + width + 5, y=_TOP + place * _SIDE + shift, class_="tick")
        for value, place, shift in ((top, 0, 12), (0.0, 0.5, 5), (-top, 1, 0))
    ]
    return join([bar, tag("rect", x=x, y=_TOP, width=width, height=_SIDE, class_="frame"), *labels])
