r"""Samples of an earlier policy as samples of the present one, by importance weights. Needs torch alone.

For each prompt, n completions $y_i \sim \mu$ were sampled and c are right. The policy is now $\pi$, and
$\rho_i = \pi(y_i)/\mu(y_i)$ are ratios of whole sequences at the sampling temperature. With score vectors $s_i$ of
$\pi$, $E_\mu[\rho s] = 0$ and $E_\mu[\rho\, r s] = \nabla p$, and over different samples
$E_\mu[\prod_{j \in T} \rho_j (1 - r_j)] = (1-p)^{|T|}$. So

$$ g_k = \frac1n \sum_{i \text{ right}} \rho_i s_i \Big(W - h_k(c-1)\Big) - \frac1n \sum_{i \text{ wrong}} \rho_i s_i
\, h_k(c), \qquad W = k\, e_{k-1}(\rho_j : j \text{ wrong}) \Big/ \binom{n-1}{k-1} $$

is unbiased for $w_k(p) \nabla p$, with $e_j$ the elementary symmetric polynomial and $h_k$ any function of the number
of right samples among the *others*. Here it is that of `sample_coefficients`, so that ratios of 1 give its estimate. As
there, each prompt has two numbers, the coefficients of $S^+ = \sum_{right} \rho_i s_i$ and
$S^- = \sum_{wrong} \rho_i s_i$, and a prompt with c = 0 or c = n contributes nothing. A clipped weight f(W) has no such
form.
"""

from __future__ import annotations

import torch
from torch import Tensor


def miss_estimates(log_ratios: Tensor, wrong: Tensor, num_samples: Tensor) -> Tensor:
    r"""Unbiased estimates of $(1-p)^j$ from the n - 1 samples other than a right one.

    $e_j(\rho_i : i \text{ wrong}) / \binom{n-1}{j}$, computed in logarithms by adding one sample at a time. All terms
    are positive, so nothing cancels, and nothing overflows before the result does.

    Args:
        log_ratios: [m, n] float64, log rho of each sample.
        wrong: [m, n] bool, False for right samples and where there is none.
        num_samples: [m] samples of each prompt, at most n.

    Returns:
        [m, n] float64, j = 0..n-1; 0 for j >= num_samples, infinite on overflow, NaN if a ratio is.
    """
    m, n = log_ratios.shape
    total = log_ratios.new_full((m, n), -torch.inf)
    total[:, 0] = 0.0
    for log_ratio in torch.where(wrong, log_ratios, -torch.inf).T:
        total[:, 1:] = torch.logaddexp(total[:, 1:], total[:, :-1] + log_ratio[:, None])
    j, others = torch.arange(n, dtype=log_ratios.dtype), (num_samples - 1).to(log_ratios.dtype)[:, None]
    possible = j <= others
    subsets = torch.lgamma(others + 1) - torch.lgamma(j + 1) - torch.lgamma(torch.where(possible, others - j, 0.0) + 1)
    return torch.where(possible, (total - subsets).exp(), 0.0)


def effective_share(log_ratios: Tensor, counted: Tensor) -> Tensor:
    r"""Effective sample size over sample size: $\frac{(\sum \rho)^2}{n \sum \rho^2} \min(\bar\rho, 1/\bar\rho)$.

    The first factor is the usual effective sample size (Kong 1992; Owen 2013, *Monte Carlo theory, methods and
    examples*, Sec. 9.3), which depends only on how unequal the ratios are. The second factor lowers it where the mean
    ratio is far from its expectation of 1: samples with equal ratios near 0 are not samples of the policy.

    Args:
        log_ratios: [m, n] float64; counted: [m, n] bool, the samples there are.

    Returns:
        [m] in [0, 1]; 0 where a ratio is not finite and where there is no sample.
    """
    logs = torch.where(counted, log_ratios, -torch.inf)
    size = counted.sum(1).to(logs.dtype).log()
    mean, square = logs.logsumexp(1) - size, (2 * logs).logsumexp(1) - size
    return (2 * mean - square - mean.abs()).exp().nan_to_num(0.0).clamp(max=1.0)


def reweighted(positive: Tensor, num_samples: Tensor, num_correct: Tensor, misses: Tensor, ks: Tensor) -> Tensor:
    r"""[K, m] coefficients of S+ with importance ratios. Those of S- are the same as on fresh samples.

    $\alpha^+_k = (k\, m_{k-1} - h_k(c-1))/n$ with $h_k(c') = W_k(c') c'/(n-1)$.

    Args:
        positive: [K, m] alpha+ of `sample_coefficients` for K values of k.
        num_samples, num_correct: [m]. misses: [m, n] of `miss_estimates`. ks: [K] int64, each at most n.
    """
    baseline = positive * (num_correct - 1) / (num_samples - num_correct).clamp(min=1)
    found = ks[:, None] * misses.T[ks - 1] / num_samples - baseline
    return torch.where((num_correct > 0) & (num_correct < num_samples), found, positive)
