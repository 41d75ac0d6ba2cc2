r"""Who pays: the change of pass@1 among easy and among hard prompts. Needs torch alone.

Groups by the solve rate of the very samples that measure the change would be biased: of a prompt with all samples right
the leave-one-out form says 0. So each *sample* is grouped by the solve rate $b_i$ of the others of its
prompt, at which it does not look. $T_g = \frac1n \sum_i (\rho_i - 1)(r_i - b_i) [b_i \in g]$ has the expectation
$P(b \in g)\,(p_{t+1} - p_t)$ exactly, and the groups add up to the change of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from passk_guard.change.per_prompt import prompt_changes
from passk_guard.change.samples import checked_samples
from passk_guard.utils.clusters import error_parts, numbered
from passk_guard.utils.errors import GuardError

HARD_AND_EASY = (1 / 3, 2 / 3)
"""Solve rates between hard, medium and easy prompts."""


@dataclass(frozen=True)
class RateChange:
    """The change of pass@1 of the prompts whose solve rate lies in [low, high), or [low, 1] for the last group.

    Attributes:
        low, high: of the solve rate.
        share: of the prompts, in [0, 1].
        pass_at_1: their mean change; NaN where the share is 0. pass_at_1_se: its standard error over prompts.
    """

    low: float
    high: float
    share: float
    pass_at_1: float
    pass_at_1_se: float


def change_by_solve_rate(
    log_ratios: Tensor,
    correct: Tensor,
    *,
    mask: Tensor | None = None,
    edges: Sequence[float] = HARD_AND_EASY,
    clusters: Sequence[Hashable] | None = None,
    sampler: Tensor | None = None,
) -> list[RateChange]:
    """The change of pass@1 by solve rate, from hard to easy.

    Args:
        log_ratios, correct, mask, sampler: [m, n] as of `estimate_change`. clusters: [m] likewise.
        edges: ascending solve rates between the groups, each in (0, 1).

    Raises:
        GuardError: edges that do not ascend within (0, 1), or what `estimate_change` raises for its tensors.
    """
    limits = [0.0, *edges, 1.0]
    if any(low >= high for low, high in pairwise(limits)):
        raise GuardError(f"Expected ascending `edges` in (0, 1); found {list(edges)}.")
    samples = checked_samples(correct, 1, log_ratios=log_ratios, sampler=sampler, mask=mask)
    found = prompt_changes(samples.log_ratios, samples.right, samples.counted, 1, samples.sampler)
    group = torch.bucketize(found.baseline, torch.tensor(edges, dtype=torch.float64), right=True)
    part = samples.counted / found.size[:, None]
    apart = numbered(range(len(part)) if clusters is None else clusters)
    return [
        _group(low, high, ((group == g) * found.step * found.advantage).sum(1), ((group == g) * part).sum(1), apart)
        for g, (low, high) in enumerate(pairwise(limits))
    ]


def _group(low: float, high: float, changes: Tensor, shares: Tensor, cluster: Tensor) -> RateChange:
    """A ratio of two means over prompts, with its error to first order."""
    share = float(shares.mean())
    if share == 0:
        return RateChange(low, high, 0.0, math.nan, math.nan)
    mean = float(changes.mean()) / share
    parts = error_parts(changes - mean * shares, cluster)
    return RateChange(low, high, share, mean, float(parts.norm()) / share if len(parts) > 1 else math.nan)
