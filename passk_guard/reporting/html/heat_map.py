"""A signed square matrix, such as the prompt kernel, as a heat map that reads at 20 rows and at 1,000."""

from __future__ import annotations

import base64
import math
import struct
import zlib

import torch
from markupsafe import Markup
from torch import Tensor

from passk_guard.reporting.html.axes import round_ticks, write_number
from passk_guard.reporting.html.frame import figure, tag

NEGATIVE, POSITIVE, UNDEFINED = (213, 94, 0), (0, 114, 178), (128, 128, 128)  # Okabe and Ito's vermillion and blue
_LARGEST = 400  # rows and columns that are drawn one by one; more are averaged
_WIDTH, _SIDE, _LEFT, _TOP = 640, 400, 96, 12


def heat_map(matrix: Tensor, *, alt: str, title: str = "", label: str = "prompt") -> Markup:
    """Rows downwards, columns to the right, in colours around zero, full from the 98% quantile of |value| on.

    Args:
        matrix: [m, m] real numbers, m >= 1; NaN is grey.
        alt: what the picture shows, for those who do not see it.
        title: above the picture. label: beneath and beside it.
    """
    small, block = averaged_down(matrix, _LARGEST)
    top = colour_limit(small)
    beside = f"translate(18 {_TOP + _SIDE / 2}) rotate(-90)"
    parts = [
        _image(signed_pixels(small, top), _LEFT, _SIDE, crisp=len(small) <= 200),
        tag("rect", x=_LEFT, y=_TOP, width=_SIDE, height=_SIDE, class_="frame"),
        *_ticks(len(matrix)),
        tag("text", label, x=_LEFT + _SIDE / 2, y=_TOP + _SIDE + 48, text_anchor="middle", class_="axis-name"),
        tag("text", label, text_anchor="middle", class_="axis-name", transform=beside),
        *_colour_bar(top),
    ]
    beneath = tag("div", " ".join(_remarks(small, top, block)), class_="note")
    return figure(parts, beneath, title=title, alt=alt, size=(_WIDTH, _TOP + _SIDE + 56))


def _remarks(values: Tensor, top: float, block: int) -> list[str]:
    remarks = ["Vermillion: below zero, blue: above."]
    if block > 1:
        remarks.append(f"Each cell is the mean of {block} x {block} entries.")
    beyond = float((values.abs() > top).double().mean())
    if beyond:
        remarks.append(f"Colours are full from {write_number(top)} on; {100 * beyond:.2g}% of the cells lie beyond.")
    if bool(values.isnan().any()):
        remarks.append("Grey: no value.")
    return remarks


def _image(pixels: Tensor, x: float, width: float, *, crisp: bool) -> Markup:
    data = f"data:image/png;base64,{base64.b64encode(encode_png(pixels)).decode()}"
    place = {"x": x, "y": _TOP, "width": width, "height": _SIDE}
    return tag("image", **place, preserveAspectRatio="none", class_="crisp" if crisp else None, href=data)


def _ticks(count: int) -> list[Markup]:
    """Numbers of rows and columns, from 1, at the middle of their cells."""
    numbers = [1, *(int(tick) for tick in round_ticks(0, count, 6, whole=True) if tick > count / 20 and tick > 1)]
    parts = []
    for number, value in enumerate(numbers):
        at, class_ = (value - 0.5) / count * _SIDE, "tick second" if number % 2 else "tick"
        x, y = round(_LEFT + at, 1), round(_TOP + at + 5, 1)
        parts.append(tag("text", value, x=x, y=_TOP + _SIDE + 22, text_anchor="middle", class_=class_))
        parts.append(tag("text", value, x=_LEFT - 8, y=y, text_anchor="end", class_="tick"))
    return parts


def _colour_bar(top: float) -> list[Markup]:
    x, width = _LEFT + _SIDE + 14, 16
    labels = [
        tag("text", f"{value:.3g}".replace("-", "−"), x=x + width + 5, y=_TOP + place * _SIDE + shift, class_="tick")
        for value, place, shift in ((top, 0, 12), (0.0, 0.5, 5), (-top, 1, 0))
    ]
    bar = _image(signed_pixels(torch.linspace(top, -top, 101)[:, None], top), x, width, crisp=False)
    return [bar, tag("rect", x=x, y=_TOP, width=width, height=_SIDE, class_="frame"), *labels]


def signed_pixels(matrix: Tensor, limit: float) -> Tensor:
    """Colours of signed numbers: vermillion below zero, blue above, the stronger the larger |value| / limit is.

    Strength is opacity, so that zero is the background the picture is laid on, light or dark.

    Args:
        matrix: [rows, columns]; NaN becomes grey, which neither sign is.
        limit: |value| from which on the colour is full, > 0.

    Returns:
        [rows, columns, 4] uint8, red, green, blue, opacity.
    """
    values = matrix.detach().to("cpu", torch.float64)
    undefined = values.isnan()
    strength = (values.nan_to_num(0.0, math.inf, -math.inf).abs() / limit).clamp(max=1.0)
    colours = torch.where(values[..., None] < 0, torch.tensor(NEGATIVE), torch.tensor(POSITIVE))
    colours = torch.where(undefined[..., None], torch.tensor(UNDEFINED), colours)
    opacity = torch.where(undefined, 0.6, strength).mul(255).round()
    return torch.cat([colours, opacity[..., None].to(colours.dtype)], dim=-1).to(torch.uint8)


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


def encode_png(pixels: Tensor) -> bytes:
    """A PNG file of [rows, columns, 4] uint8: a page needs no plotting library for its one picture of many cells."""
    rows, columns, _ = pixels.shape
    lines = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in pixels)  # 0: no filter
    header = struct.pack(">2I5B", columns, rows, 8, 6, 0, 0, 0)  # 6: RGBA
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines, 9)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
