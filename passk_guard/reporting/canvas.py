"""Lines, areas and numbers on a grid of pixels: enough for a picture in a tracker, with no plotting library."""

from __future__ import annotations

import torch
from torch import Tensor

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
