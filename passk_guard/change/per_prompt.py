r"""What one prompt's samples say of its change, and what they say of nothing: the controls. Needs torch alone.

Of a prompt, n samples $y_i \sim \pi_t$ were drawn and c are right; $\rho_i = \pi_{t+1}(y_i)/\pi_t(y_i)$ are ratios of
whole sequences at the sampling temperature. Since $E[\rho_i - 1] = 0$ given the *other* samples, a sum
$\frac1n \sum_i (\rho_i - 1) h(\text{others of } i)$ has mean 0 for every h. Two changes and four such controls follow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from passk_guard.passk.closed_forms import unbiased_passk_weight


@dataclass(frozen=True)
class PromptChanges:
    """Unbiased changes of each prompt before any coefficient is fitted, float64.

    Attributes:
        plain_1: [m] mean of (rho - 1) r. plain_k: [m] from symmetric polynomials; NaN where a prompt has n < k samples.
        first_order_k: [m] mean of (rho - 1) W (r - b), the change of pass@k to first order in rho - 1: biased.
        controls: [m, 4] means of (rho - 1) h for h = 1, b, W, W b; expectation 0. The last two are 0 where n < k.
        size: [m] n. step: [m, n] (rho - 1) / n, 0 where a sample does not count.
        advantage: [m, n] r - b. baseline: [m, n] b.
    """

    plain_1: Tensor
    plain_k: Tensor
    first_order_k: Tensor
    controls: Tensor
    size: Tensor
    step: Tensor
    advantage: Tensor
    baseline: Tensor

    @property
    def change_1(self) -> Tensor:
        """[m] Mean of (rho - 1)(r - b), with b the share of right samples among the others."""
        return self.plain_1 - self.controls[:, 1]

    @property
    def change_k(self) -> Tensor:
        """[m] `plain_k` with the controls that leave W (r - b) as its first order."""
        return self.plain_k + self.controls[:, 2] - self.controls[:, 3]


def prompt_changes(log_ratios: Tensor, right: Tensor, counted: Tensor, k: int) -> PromptChanges:
    r"""Change of p and of $1-(1-p)^k$ for each prompt, with the controls that go with them.

    Plain forms: $\frac1n \sum_i (\rho_i - 1) r_i$ and
    $[e_k(1 : \text{wrong}) - e_k(\rho : \text{wrong})] / \binom{n}{k}$, with $e_k$ the elementary symmetric polynomial.
    Of the other n - 1 samples $o_i$ are right: $b_i = o_i/(n-1)$ and
    $W_i = k \binom{n-1-o_i}{k-1} / \binom{n-1}{k-1}$. A single sample has no others: its b is 0.

    Args:
        log_ratios: [m, n] float64, finite. right, counted: [m, n] bool; a right sample is counted.
        k: at least 1.
    """
    size, num_right = counted.sum(1), right.sum(1)
    others = (size - 1).clamp(min=0)
    step = torch.where(counted, torch.expm1(log_ratios), 0.0) / size.clamp(min=1)[:, None]
    above = (num_right - 1).clamp(min=0)
    baseline = torch.where(right, above[:, None], num_right[:, None]).double() / others.clamp(min=1)[:, None]
    # Of a prompt with c = n nothing is wrong, and c of its n - 1 others cannot be right.
    enough = others >= k - 1
    seen = torch.stack([above, torch.minimum(num_right, others)])
    weights = enough * unbiased_passk_weight(torch.where(enough, others, k), torch.where(enough, seen, 0), k)
    weight = torch.where(right, weights[0][:, None], weights[1][:, None])
    advantage = right.double() - baseline
    controls = torch.stack([(step * h).sum(1) for h in (torch.ones_like(step), baseline, weight, weight * baseline)], 1)
    return PromptChanges(
        plain_1=torch.where(right, step, 0.0).sum(1),
        plain_k=_plain_k(log_ratios, right, counted, k),
        first_order_k=torch.where(size >= k, (step * weight * advantage).sum(1), math.nan),
        controls=controls,
        size=size,
        step=step,
        advantage=advantage,
        baseline=baseline,
    )


def log_symmetric_mean(log_values: Tensor, counted: Tensor, k: int) -> Tensor:
    r"""Log of $e_k(x) / \binom{n}{k}$, the mean product of k of a prompt's n values.

    The means $q_j$ of the first i values follow from those of the first i - 1 by
    $q_j \leftarrow (1 - j/i)\, q_j + (j/i)\, x_i\, q_{j-1}$: only positive terms, and in logarithms none overflows.
    It takes n k steps a prompt.

    Args:
        log_values: [..., n] float64; -inf for a value of 0. counted: [..., n] bool, the values there are.
        k: at least 1.

    Returns:
        [...] float64; -inf where the mean is 0, which it is for k > n.
    """
    j = torch.arange(1, k + 1, dtype=log_values.dtype)
    means = log_values.new_full((*log_values.shape[:-1], k + 1), -math.inf)
    means[..., 0] = 0.0
    for value, there, i in zip(log_values.unbind(-1), counted.unbind(-1), counted.cumsum(-1).unbind(-1), strict=True):
        share = (j / i.clamp(min=1)[..., None]).clamp(max=1.0)
        added = torch.logaddexp(torch.log1p(-share) + means[..., 1:], share.log() + value[..., None] + means[..., :-1])
        means[..., 1:] = torch.where(there[..., None], added, means[..., 1:])
    return means[..., k]


def _plain_k(log_ratios: Tensor, right: Tensor, counted: Tensor, k: int) -> Tensor:
    wrong = counted & ~right
    before = torch.where(wrong, 0.0, -math.inf)
    logs = torch.stack([before, torch.where(wrong, log_ratios, -math.inf)])
    old, new = log_symmetric_mean(logs, counted.expand_as(logs), k)
    possible = old > -math.inf
    # One recurrence for both, so that ratios of 1 give exactly 0.
    change = -old.exp() * torch.expm1(torch.where(possible, new - old, 0.0))
    return torch.where(counted.sum(1) >= k, change, math.nan)
