"""The score sums of all prompts: accumulated batch by batch, summed over ranks, and multiplied, in bounded pieces.

The sums S+ and S- of m prompts are 2m x dim numbers, and their Gram matrix 2m x 2m. Nothing else here grows with m: a
batch is sketched into separate rows, and copies are made a block at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from passk_guard.sketch import ScoreSketcher, TokenBatch
from passk_guard.utils.ranks import Ranks

_BLOCK = 1 << 22  # numbers copied at a time: 16 MiB in float32, 32 MiB in float64


def add_scores_(
    total: Tensor, sketcher: ScoreSketcher, batch: TokenBatch, temperature: float, log_probs: Tensor | None = None
) -> Tensor:
    """total[s] += the sketched scores of the batch's samples with slot s, in place.

    The sketch has one row for each slot in the batch, where `total` has two for every prompt.

    Args:
        total: [2m, dim].
        sketcher: whose dimension that is.
        batch: samples with slots in -1..2m-1; -1 counts nowhere.
        temperature: of the sampling.
        log_probs: [B] or None; log pi(y_i | x_i) is written into it.

    Returns:
        `total`, or a copy in float64 where the sketch is (of a float64 model) and `total` was not.

    Raises:
        GuardError, FailedRefresh: as `ScoreSketcher.sketch`.
    """
    found, local = batch.row_slots.unique(return_inverse=True)
    unused = int(bool((found == -1).any()))  # sorted: -1 is the first, and becomes -1 again
    rows = found[unused:].to(total.device)
    scores = sketcher.sketch(
        batch.input_ids,
        batch.attention_mask,
        batch.completion_mask,
        local - unused,
        max(1, rows.numel()),
        temperature=temperature,
        log_probs=log_probs,
    )
    total = total.to(torch.promote_types(total.dtype, scores.dtype))
    return total.index_add_(0, rows, scores[: rows.numel()].to(total))


def add_reweighted_scores_(
    total: Tensor, sketcher: ScoreSketcher, batch: TokenBatch, temperature: float, sampled: Tensor
) -> tuple[Tensor, Tensor]:
    r"""total[s] += the sketched scores of the batch's samples with slot s, each times $\rho_i = \pi(y_i)/\mu(y_i)$.

    The ratios are known only after the one pass, so each sample has a separate row until then, where `add_scores_`
    needs one a slot.

    Args:
        total, sketcher, batch, temperature: as of `add_scores_`.
        sampled: [B] float64 log mu(y_i | x_i), under the policy that the samples are from.

    Returns:
        `total` as of `add_scores_`, and [B] float64 log ratios, 0 for slot -1.

    Raises:
        GuardError, FailedRefresh: as `ScoreSketcher.sketch`.
    """
    counted = batch.slots >= 0
    size, found = int(counted.sum()), torch.empty_like(sampled)
    scores = sketcher.sketch(
        batch.input_ids,
        batch.attention_mask,
        batch.completion_mask,
        torch.where(counted, counted.cumsum(0) - 1, -1),
        max(1, size),
        temperature=temperature,
        log_probs=found,
    )
    log_ratios = torch.where(counted.to(sampled.device), found - sampled, 0.0)
    ratios = log_ratios.exp()[counted.to(sampled.device)]
    total = total.to(torch.promote_types(total.dtype, scores.dtype))
    scores = scores[:size].mul_(ratios.to(scores)[:, None])
    return total.index_add_(0, batch.slots[counted].to(total.device), scores.to(total)), log_ratios


def sum_over_ranks_(total: Tensor, ranks: Ranks) -> Tensor:
    """Sum over ranks, in place, some rows at a time; every rank calls it with the same shape.

    Returns:
        `total` itself, with the same bits on every rank.
    """
    if ranks.count > 1:
        for block in total.split(max(1, _BLOCK // max(1, total[0].numel()))):
            block.copy_(ranks.sum(block))
    return total


def gram_matrix(sums: Tensor, rows: Tensor) -> Tensor:
    """Compute the inner products of all pairs of the given rows, one block of columns at a time.

    Args:
        sums: [2m, dim] floating, on any device.
        rows: [N] int64, in the order of the result.

    Returns:
        [N, N] float64 on the CPU.
    """
    rows = rows.to(sums.device)
    total = torch.zeros(rows.numel(), rows.numel(), dtype=torch.float64)
    for block in sums.split(max(1, _BLOCK // max(1, rows.numel())), dim=1):
        taken = block[rows].double().cpu()
        total.addmm_(taken, taken.T)
    return total
