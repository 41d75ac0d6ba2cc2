"""The kernel and the curve over k as images in the trackers of a run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from passk_guard.estimation.records import ConflictCurve, ConflictEstimate, ProbeGram
from passk_guard.reporting.log_rows import PREFIX
from passk_guard.reporting.pixels import NEGATIVE, POSITIVE, averaged_down, colour_limit, on_white, signed_pixels
from passk_guard.utils.text import describe_error

# Lines, areas and numbers on a grid of pixels: enough for a picture in a tracker, with no plotting library.


Colour = tuple[int, int, int]
INK, GREY, FAINT = (30, 30, 30), (130, 130, 130), (215, 215, 215)

# Three columns and five rows a sign, read row by row.
_SIGNS = {
    "0": "111101101101111",
    "1": "010110010010111",
    "2": "111001111100111",
    "3": "111001111001111",
    "4": "101101111001001",
    "5": "111100111001111",
    "6": "111100111101111",
    "7": "111001010010010",
    "8": "111101111101111",
    "9": "111101111001111",
    "-": "000000111000000",
    "+": "000010111010000",
    ".": "000000000000010",
    "e": "000111111100111",
    "k": "100101110110101",
    "=": "000111000111000",
    "*": "101010101000000",
    "c": "000111100100111",
    "o": "000111101101111",
    "s": "000111110011111",
    " ": "000000000000000",
}
SIGN_WIDTH, SIGN_HEIGHT = 8, 10  # pixels of a sign at the size it is written, its gap included


def blank(height: int, width: int) -> Tensor:
    """[height, width, 3] uint8, white."""
    return torch.full((height, width, 3), 255, dtype=torch.uint8)


def fill(canvas: Tensor, top: int, bottom: int, left: int, right: int, colour: Colour) -> None:
    """Colour the rows top..bottom and columns left..right, ends included; what lies outside is left out."""
    area = canvas[max(top, 0) : max(bottom + 1, 0), max(left, 0) : max(right + 1, 0)]
    area[:] = torch.tensor(colour, dtype=torch.uint8)


def draw_line(canvas: Tensor, start: tuple[int, int], end: tuple[int, int], colour: Colour, width: int = 2) -> None:
    """A straight line between two (row, column) points, each pixel `width` wide."""
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    for i in range(steps + 1):
        row, column = (round(a + (b - a) * i / steps) for a, b in zip(start, end, strict=True))
        fill(canvas, row, row + width - 1, column, column + width - 1, colour)


def write(canvas: Tensor, text: str, row: int, column: int, colour: Colour = INK) -> None:
    """Write numbers and the few signs there are with their top left corner at (row, column); others leave a gap."""
    for place, sign in enumerate(text):
        for number, bit in enumerate(_SIGNS.get(sign, _SIGNS[" "])):
            if bit == "1":
                top, left = row + 2 * (number // 3), column + SIGN_WIDTH * place + 2 * (number % 3)
                fill(canvas, top, top + 1, left, left + 1, colour)


# The prompt kernel and the curve over k as pictures for trackers.


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


logger = logging.getLogger(__name__)


class Images:
    """Sends two pictures every few refreshes to TensorBoard, wandb and trackio, where the run reports to them.

    Trackers are found where the run has them, never imported or started here. One that fails is logged once, and
    asked again the next time.

    Args:
        trainer: a transformers Trainer.
        every: refreshes between pictures, the first refresh with a kernel included; 0 sends none.
    """

    def __init__(self, trainer: Any, every: int) -> None:
        self._trainer, self._every = trainer, every
        self._seen = 0
        self._failed: set[str] = set()

    def refresh(self, step: int, estimate: ConflictEstimate, probe: ProbeGram | None = None) -> list[str]:
        """Count a refresh and, where it is due, send its pictures.

        Args:
            step: they stand at.
            estimate: with its kernel; without one nothing is sent or counted.
            probe: counts of the same prompts, for the order from easy to hard.

        Returns:
            Names of the trackers that took them.
        """
        if not self._every or estimate.kernel.numel() == 0:
            return []
        self._seen += 1
        trackers = self._trackers()
        if (self._seen - 1) % self._every or not trackers:
            return []
        try:
            pictures = _pictures(estimate, probe)
        except Exception as error:
            self._tell("the pictures of the kernel could not be drawn", error)
            return []
        return [name for name, send in trackers.items() if self._sent(name, send, pictures, step)]

    def _sent(self, name: str, send: Callable[[dict[str, Tensor], int], None], pictures: Any, step: int) -> bool:
        try:
            send(pictures, step)
        except Exception as error:
            self._tell(f"{name} did not take the pictures of the kernel", error)
            return False
        return True

    def _tell(self, what: str, error: Exception) -> None:
        if what not in self._failed:
            self._failed.add(what)
            logger.warning("passk_guard: %s: %s", what, describe_error(error))

    def _trackers(self) -> dict[str, Callable[[dict[str, Tensor], int], None]]:
        names = self._trainer.args.report_to or ()
        found: dict[str, Callable[[dict[str, Tensor], int], None]] = {}
        writer = _tensorboard_writer(self._trainer)
        if writer is not None:
            found["tensorboard"] = lambda pictures, step: _to_tensorboard(writer, pictures, step)
        wandb, trackio = sys.modules.get("wandb"), sys.modules.get("trackio")
        if "wandb" in names and getattr(wandb, "run", None) is not None:
            found["wandb"] = lambda pictures, step: _to_module(wandb, pictures, step)
        if "trackio" in names and trackio is not None:
            found["trackio"] = lambda pictures, step: _to_module(trackio, pictures, step)
        return found


def _pictures(estimate: ConflictEstimate, probe: ProbeGram | None) -> dict[str, Tensor]:
    rates = None if probe is None else probe.num_correct.double() / probe.num_samples.clamp(min=1)
    pictures = {PREFIX + "kernel": kernel_picture(estimate.kernel, rates)}
    if estimate.curve is not None and estimate.curve.k.numel():
        pictures[PREFIX + "k_curve"] = curve_picture(estimate.curve, estimate.k_star)
    return pictures


def _tensorboard_writer(trainer: Any) -> Any:
    """The writer of transformers' TensorBoardCallback; None before it has one and where the run has no TensorBoard."""
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", ())
    return next((w for c in callbacks if (w := getattr(c, "tb_writer", None)) is not None), None)


def _to_tensorboard(writer: Any, pictures: dict[str, Tensor], step: int) -> None:
    for name, picture in pictures.items():
        writer.add_image(name, picture, step, dataformats="HWC")


def _to_module(module: Any, pictures: dict[str, Tensor], step: int) -> None:
    # transformers logs the step as a number of its own too: a step of ours would close the row it is still writing.
    images = {name: module.Image(picture.numpy()) for name, picture in pictures.items()}
    module.log({**images, "train/global_step": step})
