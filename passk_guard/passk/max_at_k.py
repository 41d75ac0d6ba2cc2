"""pass@k for rewards that are not 0/1: advantages for the expected best reward of k samples. Needs torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from passk_guard.passk.closed_forms import check_k, unbiased_passk_weight
from passk_guard.utils.arguments import as_counts
from passk_guard.utils.errors import GuardError


def max_at_k_advantages(rewards: Tensor, k: int, *, mask: Tensor | None = None, baseline: bool = True) -> Tensor:
    r"""Advantages whose policy gradient is that of max@k, the expected maximum of the rewards of k samples.

    $A_i = k (G_i - B_i)$, where $G_i = E_K[(r_i - \max r_K)^+]$ is what sample i adds to k - 1 of the n - 1 others,
    over all such subsets K, and $B_i = E_{j, K}[(r_j - \max r_K)^+]$ the same for one of the others in the place of i.
    $\frac{1}{n} \sum_i A_i \nabla \log \pi(y_i)$ is unbiased for grad E[max of k]: neither K nor B_i depends on i. A
    common shift of all rewards changes nothing. On 0/1 rewards these are `passk_advantages`, and for k = 1, where the
    empty set has the maximum 0, RLOO.

    k G_i is PKPO's transform with its baseline "leave one out minus one" (arXiv 2505.15201), as a mean over the
    samples where the paper has a sum; B_i is not in the paper and takes noise away. Computed from the gaps d_j between
    sorted rewards, $G_i = \sum_{j<i} d_j \binom{j}{k-1} / \binom{n-1}{k-1}$: a sum of terms of one sign, in
    O(n log n).

    Args:
        rewards: [m, n] real, n samples for each of m prompts.
        k: 1 <= k <= n.
        mask: [m, n] bool, False where a sample has no reward, as in `passk_advantages`.
        baseline: False leaves B_i out. For k = 1 these are then the rewards themselves, which a shift does change.

    Returns:
        [m, n] tensor: rewards' dtype where it is floating, else torch's default float.

    Raises:
        GuardError: k larger than the samples of a prompt, a reward that is not finite, or shapes that do not fit.
    """
    if not isinstance(rewards, Tensor) or rewards.is_complex() or rewards.ndim != 2:
        found = tuple(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise GuardError(f"Expected `rewards` to be a real tensor of shape [prompts, samples]; found {found}.")
    valid = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    if valid.shape != rewards.shape:
        raise GuardError(f"Expected `mask` of shape {tuple(rewards.shape)}; found {tuple(valid.shape)}.")
    if not bool((rewards.isfinite() | ~valid).all()):
        raise GuardError("Expected finite `rewards`; found others. Leave such samples out with `mask`.")
    counts = valid.sum(1)
    check_k(counts[counts > 0], as_counts(k, "k"))

    # The missing ones come last, and get the largest reward: no gap lies before, between or after them.
    known = torch.where(valid, rewards.double(), -torch.inf)
    largest = torch.where(counts > 0, known.amax(1), 0.0)[:, None]
    ordered, order = torch.where(valid, known, torch.inf).sort(dim=1)
    ordered = torch.minimum(ordered, largest)
    gaps, lowest = ordered.diff(dim=1), ordered[:, :1]
    below = torch.arange(gaps.shape[1] + 1, device=rewards.device)  # j: how many samples lie below a gap, from 0
    others = counts[:, None].double().clamp(min=k) - 1
    chance = _all_among_lowest(others, below, k)  # times k
    advantages = _before(gaps * chance[:, 1:]) + (lowest if k == 1 else 0.0)
    if baseline:
        share = chance * ((others - below) / others.clamp(min=1)).clamp(min=0)  # of the others, above the gap
        without = gaps * share[:, :-1]  # i lies below this gap, and leaves one sample less there
        average = _before(gaps * share[:, 1:]) + without.sum(1, keepdim=True) - _before(without)
        if k == 1:
            average = average + torch.where(others > 0, lowest, 0.0)
        advantages = advantages - average
    advantages = torch.empty_like(advantages).scatter_(1, order, advantages)
    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    return torch.where(valid, advantages, 0.0).to(dtype)


def _all_among_lowest(others: Tensor, below: Tensor, k: int) -> Tensor:
    r"""k times the chance that k - 1 of these many samples [m, 1] all are among the j lowest."""
    sizes, which = others.flatten().unique(return_inverse=True)
    above = (sizes[:, None] - below).clamp(min=0)
    return unbiased_passk_weight(sizes[:, None].expand_as(above), above, k)[which]


def _before(x: Tensor) -> Tensor:
    """[m, n-1] -> [m, n]: the sum of the entries before each place."""
    return torch.nn.functional.pad(x.cumsum(1), (1, 0))
