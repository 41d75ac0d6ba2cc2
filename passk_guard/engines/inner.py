"""Inner products of vectors held as lists of tensors, in float64 without a float64 copy of either."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SLICE = 1 << 22  # entries turned into float64 at a time: 32 MiB


def local_inner_products(pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]], device: torch.device) -> Tensor:
    """Sum over the tensors a_i, b_i of each pair of <a_i, b_i>: what this process holds of the inner product.

    Args:
        pairs: P pairs of lists of tensors; within a pair the lists are equally long and their tensors have the same
            shapes, in any floating dtype. The two may be the same list.
        device: of the result.

    Returns:
        [P] float64. Squares of float32 entries up to 1e38 are finite in it; NaN and inf come through. All NaN where
        this process could not compute them, out of memory above all.
    """
    totals = torch.zeros(len(pairs), dtype=torch.float64, device=device)
    try:
        for total, (left, right) in zip(totals, pairs, strict=True):
            for a, b in zip(left, right, strict=True):
                total += _dot(a.detach(), b.detach()).to(device)
    except (RuntimeError, MemoryError):
        # The other ranks wait in the reduction that comes next: NaN tells all of them alike.
        totals.fill_(torch.nan)
    return totals


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise ValueError(f"Expected parts of equal shapes; found {tuple(a.shape)} and {tuple(b.shape)}.")
    slices = zip(a.reshape(-1).split(_SLICE), b.reshape(-1).split(_SLICE), strict=True)
    zero = torch.zeros((), dtype=torch.float64, device=a.device)
    return sum((torch.dot(x.double(), y.double()) for x, y in slices), zero)
