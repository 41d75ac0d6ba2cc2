"""Names that prompts share, and means over prompts that are not independent. Needs torch alone."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor


def numbered(names: Iterable[Hashable]) -> Tensor:
    """[m] int64 number of each name, from 0 in the order of first sight."""
    seen: dict[Hashable, int] = {}
    return torch.tensor([seen.setdefault(name, len(seen)) for name in names], dtype=torch.int64)


def cluster_sums(values: Tensor, cluster: Tensor, dim: int = 0) -> Tensor:
    """Sums over the entries of `dim` with one number in `cluster`, which has all numbers from 0."""
    shape = list(values.shape)
    shape[dim] = int(cluster.max()) + 1 if cluster.numel() else 0
    return values.new_zeros(shape).index_add_(dim, cluster, values)


def error_parts(values: Tensor, cluster: Tensor) -> Tensor:
    r"""[C] parts a of the error of the mean of values [m]: its variance is the sum of their squares.

    $a_c = \sqrt{C/(C-1)} \sum_{x \in c} (v_x - \bar v) / m$ over C independent clusters (Liang & Zeger 1986): for
    clusters of one value each, the variance is that of a mean of independent values.
    """
    sums = cluster_sums(values - values.mean(), cluster) / len(values)
    return sums * (len(sums) / max(1, len(sums) - 1)) ** 0.5
