"""The prompt kernel and the curve over k as pictures for trackers."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from passk_guard.estimation.records import ConflictCurve
from passk_guard.pixels import NEGATIVE, POSITIVE, averaged_down, colour_limit, on_white, signed_pixels
from passk_guard.reporting.canvas import FAINT, GREY, INK, SIGN_HEIGHT, SIGN_WIDTH, blank, draw_line, fill, write

_SIDE = 360  # pixels, about, of each side of a kernel; one with more prompts is averaged down to it
_BAND = (190, 215, 235)
_HEIGHT, _WIDTH = 300, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 440, 24, 262


def kernel_picture(kernel: Tensor, rates: Tensor | None = None) -> Tensor:
    """The kernel as a heat map on white: vermillion below zero, blue above, a colour bar with its ends at the right.

    Args:
        kernel: [m, m], m >= 1.
        rates: [m] pass rates; rows and columns then run from easy to hard, as in Fig. 2 of arXiv 2602.21189.

    Returns:
        [height, width, 3] uint8.
    """
    if rates is not None:
        order = torch.argsort(rates, descending=True, stable=True).to(kernel.device)
        kernel = kernel[order][:, order]
    small, _ = averaged_down(kernel, _SIDE)
    limit = colour_limit(small)
    scale = max(1, round(_SIDE / max(small.shape)))
    cells = on_white(signed_pixels(small, limit)).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    side = cells.shape[0]
    canvas = blank(side + 8, side + 120)
    fill(canvas, 3, side + 4, 3, side + 4, GREY)
    canvas[4 : side + 4, 4 : side + 4] = cells
    bar = on_white(signed_pixels(torch.linspace(limit, -limit, side)[:, None], limit))
    canvas[4 : side + 4, side + 16 : side + 32] = bar
    for value, row in ((f"+{limit:.2g}", 4), ("0", side // 2), (f"-{limit:.2g}", side - SIGN_HEIGHT + 4)):
        write(canvas, value, row, side + 38)
    return canvas


def curve_picture(curve: ConflictCurve, k_star: int | None) -> Tensor:
    """cos(grad J_k, grad J_1) over k with its interval, from -1 to 1; a vertical line at k*.

    Where the probe does not determine the cosine nothing is drawn.

    Returns:
        [height, width, 3] uint8.
    """
    canvas = blank(_HEIGHT, _WIDTH)
    ks = [int(k) for k in curve.k]
    for value in (-1.0, -0.5, 0.0, 0.5, 1.0):
        row = _row(value)
        fill(canvas, row, row, _LEFT, _RIGHT, GREY if value == 0 else FAINT)
        text = f"{value:+.1f}" if value else "0"
        write(canvas, text, row - SIGN_HEIGHT // 2, _LEFT - 6 - SIGN_WIDTH * len(text))
    for k in _labelled(ks):
        text = str(k)
        write(canvas, text, _BOTTOM + 10, _column(k, ks) - SIGN_WIDTH * len(text) // 2)
    write(canvas, "cos", 6, 4)
    write(canvas, "k", _BOTTOM + 10, _RIGHT + 8)
    _draw_band(canvas, curve, ks)
    if k_star is not None:
        column = _column(k_star, ks)
        draw_line(canvas, (_TOP, column), (_BOTTOM, column), GREY)
        write(canvas, f"k*={k_star}", 6, min(column - 12, _WIDTH - 60))
    _draw_curve(canvas, curve, ks)
    return canvas


def _draw_band(canvas: Tensor, curve: ConflictCurve, ks: list[int]) -> None:
    for i in range(len(ks) - 1):
        ends = [*curve.ci_low[i : i + 2].tolist(), *curve.ci_high[i : i + 2].tolist()]
        if any(v != v for v in ends):
            continue
        left, right = _column(ks[i], ks), _column(ks[i + 1], ks)
        for column in range(left, right + 1):
            share = (column - left) / max(right - left, 1)
            low, high = ends[0] + share * (ends[1] - ends[0]), ends[2] + share * (ends[3] - ends[2])
            fill(canvas, _row(high), _row(low), column, column, _BAND)


def _draw_curve(canvas: Tensor, curve: ConflictCurve, ks: list[int]) -> None:
    points = [None if c != c else (_row(c), _column(k, ks)) for k, c in zip(ks, curve.cosine.tolist(), strict=True)]
    for before, after in pairwise(points):
        if before is not None and after is not None:
            draw_line(canvas, before, after, POSITIVE)
    for point, established in zip(points, curve.established.tolist(), strict=True):
        if point is not None:
            colour = NEGATIVE if established else INK
            fill(canvas, point[0] - 3, point[0] + 3, point[1] - 3, point[1] + 3, colour)


def _labelled(ks: list[int]) -> list[int]:
    step = max(1, -(-len(ks) // 10))
    return ks[::step]


def _row(value: float) -> int:
    return round(_BOTTOM - (min(max(value, -1.0), 1.0) + 1) / 2 * (_BOTTOM - _TOP))


def _column(k: int, ks: list[int]) -> int:
    share = (k - ks[0]) / max(ks[-1] - ks[0], 1)
    return round(_LEFT + 10 + min(max(share, 0.0), 1.0) * (_RIGHT - _LEFT - 20))
