"""PKPO's reward transforms: pass@k policy gradients for real-valued rewards. Needs torch alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from passk_guard.utils.errors import GuardError

_LARGEST = 1e300  # sums and differences of rewards stay finite
Baseline = Literal["none", "leave_one_out", "leave_one_out_minus_one"]


def max_at_k(rewards: Tensor, k: int) -> Tensor:
    r"""Unbiased estimate of the expected maximum of k rewards: the mean of the maximum over all k-subsets.

    $\rho = \sum_i \binom{i-1}{k-1} g_{(i)} / \binom{n}{k}$ over rewards sorted upwards (PKPO, arXiv 2505.15201,
    Sec. 3). On 0/1 rewards it is pass@k.

    Args:
        rewards: [..., n] real.
        k: 1 <= k <= n.

    Returns:
        [...] float64.

    Raises:
        GuardError: k outside 1..n, or a reward that is not finite.
    """
    g, _ = _sorted(rewards, k)
    n = g.shape[-1]
    rank = torch.arange(n, device=g.device)
    return (_ratio(rank, k - 1, n, k) * g).sum(-1)


def pkpo_transform(rewards: Tensor, k: int, *, baseline: Baseline = "leave_one_out_minus_one") -> Tensor:
    r"""PKPO's transformed rewards s, with $\sum_i s_i \nabla \log \pi(y_i)$ unbiased for the gradient of max@k.

    Averages over the k-subsets K that hold i, divided by $\binom{n}{k}$ in all (PKPO, arXiv 2505.15201, Sec. 3-4):

    - "none": $s_i = \sum_{K \ni i} \max g(K) / \binom{n}{k}$.
    - "leave_one_out": s minus the mean of s over the other n - 1 samples taken alone,
      $\frac{k}{n-1} \rho_k(g_{-i})$. Needs k < n.
    - "leave_one_out_minus_one": $\sum_{K \ni i} [\max g(K) - \max g(K \setminus i)] / \binom{n}{k}$, the lowest
      variance of the three in the paper. A subset of one has nothing left without i; its maximum counts as 0.

    Note the convention: a *sum* over samples, where `passk_advantages` is a mean.

    Args:
        rewards: [..., n] real.
        k: 1 <= k <= n.
        baseline: which of the three.

    Returns:
        [..., n] float64, in the order of `rewards`.

    Raises:
        GuardError: k outside 1..n, a reward that is not finite, k = n with "leave_one_out", or an unknown baseline.
    """
    g, order = _sorted(rewards, k)
    n = g.shape[-1]
    rank = torch.arange(n, device=g.device)
    # i is the maximum of C(i-1, k-1) subsets; a larger j is the maximum of C(j-2, k-2) that hold i.
    above = _ratio(rank - 1, k - 2, n, k) * g
    s = _ratio(rank, k - 1, n, k) * g + _sum_after(above)
    if baseline == "leave_one_out":
        if k == n:
            raise GuardError(f"Expected k < n for the leave-one-out baseline; found k={k}, n={n}. Sample one more.")
        s = s - k / (n - 1) * _max_without_each(g, k)
    elif baseline == "leave_one_out_minus_one":
        if k > 1:
            s = s - k / n * _max_without_each(g, k - 1)
    elif baseline != "none":
        raise GuardError(
            f"Expected `baseline` 'none', 'leave_one_out' or 'leave_one_out_minus_one'; found {baseline!r}."
        )
    return torch.empty_like(s).scatter_(-1, order, s)


def _sorted(rewards: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n = rewards.shape[-1] if rewards.ndim else 0
    if not isinstance(k, int) or not 1 <= k <= n:
        raise GuardError(f"Expected 1 <= k <= n; found k={k}, n={n}. Raise the number of samples or lower `k`.")
    g, order = torch.sort(rewards.double(), dim=-1)
    if not bool((g.abs() <= _LARGEST).all()):
        raise GuardError(f"Expected finite rewards of size {_LARGEST:g} at most; found others. Leave such samples out.")
    return g, order


def _max_without_each(g: Tensor, k: int) -> Tensor:
    """rho_k of the n - 1 sorted rewards left when each one in turn is taken out: [..., n] -> [..., n]."""
    n = g.shape[-1]
    rank = torch.arange(n, device=g.device)
    below = _ratio(rank, k - 1, n - 1, k) * g
    above = _ratio(rank - 1, k - 1, n - 1, k) * g
    return torch.cumsum(below, -1) - below + _sum_after(above)


def _sum_after(x: Tensor) -> Tensor:
    """Sum of the entries strictly after each one, along the last dimension."""
    return x.flip(-1).cumsum(-1).flip(-1) - x


def _ratio(a: Tensor, b: int, n: int, k: int) -> Tensor:
    """C(a, b) / C(n, k) elementwise, 0 where the numerator's subsets do not exist."""
    top = a.double().clamp(min=max(b, 0))
    value = torch.exp(_log_binomial(top, b) - _log_binomial(torch.tensor(float(n), dtype=torch.float64), k))
    return torch.where((a >= b) & (b >= 0), value, 0.0)


def _log_binomial(n: Tensor, k: int) -> Tensor:
    k_ = torch.tensor(float(max(k, 0)), dtype=torch.float64, device=n.device)
    n = n.double()
    return torch.lgamma(n + 1) - torch.lgamma(k_ + 1) - torch.lgamma(n - k_ + 1)
