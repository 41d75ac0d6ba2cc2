r"""What the prompts of a refresh bring to the variance, whichever samples of them are taken. Needs torch alone.

Of a probe set that is asked again and again, the samples are new at every check and the prompts are not. The statistic
of pairs still estimates the angle of the population that the set was drawn from, and its variance at one check is
$v_P + v_N$, from the choice of the prompts and from the samples of each. The mean of many checks of the same prompts
averages $v_N$ away, and never $v_P$.

$v_P = 4 Var_x(E[h_1 | x])/m$ with $h_1$ of Hoeffding (1948). It needs products of two estimates of one prompt's
gradient that share no sample. The sums over right and over wrong samples are such a pair: given c, they are independent
and estimate $\nabla p$ with opposite signs. For $w_j = (1-p)^j$, j <= n - 2,
$-\frac{1}{n(n-1)} \prod_{i<j} \frac{n-c-1-i}{n-2-i} \langle a, S^+ \rangle \langle b, S^- \rangle$
is unbiased for $w_j \langle a, \nabla p \rangle \langle b, \nabla p \rangle$, by $E[c (n-c)_{j+1}] = (n)_{j+2}\, p
(1-p)^{j+1}$ with falling factorials.
"""

from __future__ import annotations

import torch
from torch import Tensor

from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.ustatistics import cluster_sizes, coefficients, other_prompt_sums


def prompt_variance(probe: ProbeGram, k: int, slope: Tensor, contrast: float) -> float | None:
    """Estimate v_P of slope . (U_k1, U_11, U_kk), unbiased but for the noise in the mean gradients; below 0 at times.

    Args:
        probe: one refresh with fresh samples, checked, m >= 3 prompts.
        k: of pass@k.
        slope: [3] float64.
        contrast: slope . U.

    Returns:
        None below 2k samples of a prompt, where nothing is unbiased for w_k^2, and where prompts come in clusters: v_P
        has more than the squares of single prompts then.
    """
    n, c = probe.num_samples.double(), probe.num_correct.double()
    m = n.numel()
    if float(n.min()) < 2 * k or len(cluster_sizes(probe)) < m:
        return None
    one, many = coefficients(probe, torch.tensor([1, k]))
    right = torch.arange(2 * m) < m  # picks S+ of every prompt
    (one_r, many_r), (one_w, many_w) = (
        [other_prompt_sums(probe, side.double(), row) / (m - 1) for row in (one, many)] for side in (right, ~right)
    )
    # E[h_1 | x] = w A + B with w = w_k(p), A and B linear in grad p.
    half, square_1, square_k = slope.tolist()
    a_right, b_right = half / 2 * one_r + square_k * many_r, half / 2 * many_r + square_1 * one_r
    a_wrong, b_wrong = half / 2 * one_w + square_k * many_w, half / 2 * many_w + square_1 * one_w
    squares = -(
        k * k * _share(n, c, 2 * k - 2) * a_right * a_wrong
        + k * _share(n, c, k - 1) * (a_right * b_wrong + b_right * a_wrong)
        + _share(n, c, 0) * b_right * b_wrong
    )
    return 4 / m * (float(squares.mean()) - contrast**2)


def _share(n: Tensor, c: Tensor, power: int) -> Tensor:
    i = torch.arange(power, dtype=torch.float64)[:, None]
    return ((n - c - 1 - i).clamp(min=0) / (n - 2 - i)).prod(0) / (n * (n - 1))
