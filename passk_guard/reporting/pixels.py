"""A signed matrix as a picture: colours that the colour-blind tell apart, and a PNG of them."""

from __future__ import annotations

import math
import struct
import zlib

import torch
from torch import Tensor

NEGATIVE, POSITIVE, UNDEFINED = (213, 94, 0), (0, 114, 178), (128, 128, 128)  # Okabe and Ito's vermillion and blue


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
