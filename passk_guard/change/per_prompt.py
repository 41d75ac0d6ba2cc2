r"""What one prompt's samples say of its change, and what they say of nothing: the controls. Needs torch alone.

Of a prompt, n samples $y_i \sim \pi_t$ were drawn and c are right; $\rho_i = \pi_{t+1}(y_i)/\pi_t(y_i)$ are ratios of
whole sequences at the sampling temperature. Since $E[\rho_i - 1] = 0$ given the *other* samples, a sum
$\frac1n \sum_i (\rho_i - 1) h(\text{others of } i)$ has mean 0 for every h. Two changes and four such controls follow.

A prompt's change D and its controls T, of expectation 0, give $D - \beta T$, of the same expectation as D for every
$\beta$ that does not look at this prompt. So each prompt takes the ridge regression of D on T over the others
(cross-fitting; Owen 2013, *Monte Carlo theory, methods and examples*, Sec. 8.9, for the regression). The start is the
leave-one-out form, from which few prompts hardly move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from passk_guard.passk.closed_forms import unbiased_passk_weight

_FEWEST_PROMPTS = 8
_STRENGTH_1 = 2.0
_STRENGTH_K = 64.0
"""Prompts that the leave-one-out forms count for. The fit for pass@1 has the samples of a prompt one by one, that for
pass@k their sum alone: with less weight on its start, 95% intervals of pass@k cover up to 5% less."""

_LARGEST = 1.0
"""Coefficients multiply weights and rates, and from one known form to another they change by 1."""


@dataclass(frozen=True)
class PromptChanges:
    """Unbiased changes of each prompt before any coefficient is fitted, float64.

    Attributes:
        plain_1: [m] mean of (rho - 1) r. plain_k: [m] from symmetric polynomials; NaN where a prompt has n < k samples.
        first_order_k: [m] mean of (rho - 1) W (r - b), the change of pass@k to first order in rho - 1: biased.
        controls: [m, 4] means of (rho - 1) h for h = 1, b, W, W b; expectation 0. The last two are 0 where n < k.
        size: [m] n. step: [m, n] (rho - 1) / n, times tau where the samples are of mu, 0 where a sample does not count.
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


def prompt_changes(
    log_ratios: Tensor, right: Tensor, counted: Tensor, k: int, sampler: Tensor | None = None
) -> PromptChanges:
    r"""Change of p and of $1-(1-p)^k$ for each prompt, with the controls that go with them.

    Plain forms: $\frac1n \sum_i (\rho_i - 1) r_i$ and
    $[e_k(1 : \text{wrong}) - e_k(\rho : \text{wrong})] / \binom{n}{k}$, with $e_k$ the elementary symmetric polynomial.
    Of the other n - 1 samples $o_i$ are right: $b_i = o_i/(n-1)$ and
    $W_i = k \binom{n-1-o_i}{k-1} / \binom{n-1}{k-1}$. A single sample has no others: its b is 0.

    Samples of $\mu$ and not of $\pi_t$ have two ratios, $\tau_i = \pi_t(y_i)/\mu(y_i)$ and $\tau_i \rho_i$, whose
    difference $\tau_i (\rho_i - 1)$ has mean 0 under $\mu$ and takes the place of $\rho_i - 1$; and
    $e_k(\tau) - e_k(\tau \rho)$ that of $e_k(1) - e_k(\rho)$.

    Args:
        log_ratios: [m, n] float64, finite. right, counted: [m, n] bool; a right sample is counted.
        k: at least 1.
        sampler: [m, n] float64, finite, log tau; None: the samples are of pi_t.
    """
    size, num_right = counted.sum(1), right.sum(1)
    others = (size - 1).clamp(min=0)
    sampler = torch.zeros_like(log_ratios) if sampler is None else sampler
    step = torch.where(counted, sampler.exp() * torch.expm1(log_ratios), 0.0) / size.clamp(min=1)[:, None]
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
        plain_k=_plain_k(sampler, log_ratios, right, counted, k),
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


def _plain_k(sampler: Tensor, log_ratios: Tensor, right: Tensor, counted: Tensor, k: int) -> Tensor:
    wrong = counted & ~right
    logs = torch.where(wrong, torch.stack([sampler, sampler + log_ratios]), -math.inf)
    old, new = log_symmetric_mean(logs, counted.expand_as(logs), k)
    possible = old > -math.inf
    # One recurrence for both, so that ratios of 1 give exactly 0.
    change = -old.exp() * torch.expm1(torch.where(possible, new - old, 0.0))
    return torch.where(counted.sum(1) >= k, change, math.nan)


def adjusted(prompts: PromptChanges) -> tuple[Tensor, Tensor]:
    """[m] change of p and of 1-(1-p)^k for each prompt, less their fitted controls; NaN where `change_k` is.

    pass@1 takes h = 1 and b and fits them sample by sample: the off-diagonal products it leaves out are smaller by
    1/n. pass@k is no sum over samples, and takes all four controls of each prompt as they are.
    """
    many = prompts.change_k.clone()
    one = _less_controls(prompts.change_1, prompts.step, prompts.advantage, prompts.baseline, prompts.size)
    enough = ~many.isnan()
    if int(enough.sum()) >= _FEWEST_PROMPTS and bool(many[enough].isfinite().all()):
        controls = prompts.controls[enough]
        slope = fitted_on_others(many[enough, None], controls[:, None], torch.ones(len(controls)), _STRENGTH_K)
        many[enough] -= (slope * controls).sum(1)
    return one, many


def mean_changes(log_ratios: Tensor, scores: Tensor, counted: Tensor, sampler: Tensor) -> Tensor:
    r"""[m] change of the mean of f for each prompt, less its fitted controls; unbiased for every real f.

    $\frac1n \sum_i (\rho_i - 1)(f_i - b_i)$ with $b_i$ the mean of f over the other samples, 0 where there is none.
    On 0/1 scores it is the change of p of `adjusted`, and takes the same controls, h = 1 and b.

    Args:
        log_ratios, sampler: [m, n] float64, finite, as of `prompt_changes`. counted: [m, n] bool.
        scores: [m, n] float64 f, on a scale of about 1, since coefficients are cut to [-1, 1]; 0 where not counted.
    """
    size = counted.sum(1)
    step = torch.where(counted, sampler.exp() * torch.expm1(log_ratios), 0.0) / size.clamp(min=1)[:, None]
    others = (size - 1).clamp(min=1)[:, None]
    baseline = (scores.sum(1, keepdim=True) - scores) / others * (size > 1)[:, None]
    advantage = scores - baseline
    return _less_controls((step * advantage).sum(1), step, advantage, baseline, size)


def _less_controls(change: Tensor, step: Tensor, advantage: Tensor, baseline: Tensor, size: Tensor) -> Tensor:
    """[m] change of a mean, less the controls h = 1 and b, fitted sample by sample on the other prompts."""
    if len(change) < _FEWEST_PROMPTS:
        return change
    features = step[..., None] * torch.stack([torch.ones_like(baseline), baseline], -1)
    slope = fitted_on_others(step * advantage, features, size, _STRENGTH_1)
    return change - (slope * features.sum(1)).sum(1)


def fitted_on_others(targets: Tensor, features: Tensor, sizes: Tensor, strength: float) -> Tensor:
    r"""[m, h] coefficients for each prompt, from the rows of the m - 1 others.

    $\beta = (F^\top F + \lambda \operatorname{diag} F^\top F)^{-1} F^\top (y - \bar y)$ with
    $\lambda$ = strength / m, cut to [-1, 1]. F is not centred: its expectation is 0. A column of zeros gets 0.

    Args:
        targets: [m, s] y, s rows a prompt, 0 where there are fewer. features: [m, s, h] F, likewise.
        sizes: [m] rows there are. strength: > 0.
    """
    size = features.abs().amax((0, 1))
    size = torch.where(size > 0, size, 1.0)  # cancels, and keeps squares of large ratios finite
    scale = targets.abs().max()
    scale = torch.where(scale > 0, scale, 1.0)
    y, f = targets / scale, features / size
    square = _over_others(torch.einsum("msh,msg->mhg", f, f))
    mean = _over_others(y.sum(1)) / _over_others(sizes.to(y.dtype))
    product = _over_others(torch.einsum("msh,ms->mh", f, y)) - _over_others(f.sum(1)) * mean[:, None]
    length = square.diagonal(dim1=1, dim2=2).sqrt()
    length = torch.where(length > 0, length, 1.0)
    ridge = strength / len(y) * torch.eye(f.shape[-1], dtype=f.dtype)
    slope = torch.linalg.solve(square / length[:, :, None] / length[:, None, :] + ridge, product / length) / length
    return (slope * scale / size).clamp(-_LARGEST, _LARGEST)


def _over_others(values: Tensor) -> Tensor:
    """Sums over dimension 0 without the entry itself. Differences of sums would lose the small ones."""
    before, after = values.cumsum(0), values.flip(0).cumsum(0).flip(0)
    none = torch.zeros_like(values[:1])
    return torch.cat([none, before[:-1]]) + torch.cat([after[1:], none])
