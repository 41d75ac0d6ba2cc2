r"""The excess of the jackknife covariance of a U-statistic, and the covariance without it. Needs torch alone.

By Hoeffding (1948) the kernel of a pair splits into $h(x, y) = \theta + h_1(x) + h_1(y) + h_2(x, y)$. The jackknife is
right about the part of the variance from $h_1$ and counts that of the degenerate $h_2$ twice (Efron & Stein 1981,
*The jackknife estimate of variance*, Sec. 4): $4 \zeta_2/(m(m-2))$ where the variance of U holds $2 \zeta_2/(m(m-1))$.
With few prompts or noisy gradients most of the variance is of that kind. $\zeta_2$ is estimated without bias from the
residuals of the additive fit.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_LARGEST_SHARE = 0.5  # a variance that is all degenerate is counted twice, no other more often


def jackknife_overshoot(kernels: Tensor) -> Tensor:
    """[m, S, S] expected excess of the jackknife covariance of S U-statistics over their covariance: prompts' shares.

    The excess is the sum over the prompts. The share of a prompt is that of the pairs in which it is the first, and the
    spread of the shares is the error of the sum.

    Args:
        kernels: [S, m, m] symmetric, one matrix of pair values for each statistic; the diagonals are not used.

    Returns:
        Zero for fewer than 4 prompts, where no degree of freedom is left.
    """
    return overshoot_by_rows([kernels], kernels.sum(2) - kernels.diagonal(dim1=1, dim2=2))


def overshoot_by_rows(blocks: Iterable[Tensor], sums: Tensor) -> Tensor:
    """The same from blocks of rows of the kernels, so that no m x m matrix is needed.

    Args:
        blocks: [S, b, m] consecutive rows of the kernels, from the first to the last.
        sums: [S, m] sum of each row without its diagonal.
    """
    count, m = sums.shape
    shares, first = sums.new_zeros(m, count, count), 0
    if m < 4:
        return shares
    mean = sums / (m - 1)
    overall = mean.mean(1, keepdim=True)
    effect = (m - 1) / (m - 2) * (mean - overall)  # the best additive fit: theta + h_1(x) + h_1(y)
    for block in blocks:
        here = slice(first, first := first + block.shape[1])
        residuals = block - (overall + effect)[:, None] - effect[:, here, None]
        residuals.diagonal(here.start, 1, 2).zero_()
        shares[here] = torch.einsum("sbm,tbm->bst", residuals, residuals)
    return shares / (m * (m - 3)) * (4 / (m * (m - 2)) - 2 / (m * (m - 1)))


def without_overshoot(jackknife: Tensor, overshoot: Tensor) -> Tensor:
    """[..., S, S] jackknife - overshoot, in no direction less than half the jackknife.

    Args:
        jackknife: [..., S, S] covariance, positive semidefinite.
        overshoot: [..., S, S] of the same statistics.
    """
    spread = jackknife.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    unit = torch.where(spread > 0, spread, torch.ones_like(spread))  # the statistics may differ by many powers of ten
    scale = unit[..., :, None] * unit[..., None, :]
    size, axes = torch.linalg.eigh(jackknife / scale)
    size = size.clamp(min=1e-12)
    to_white, from_white = axes / size.sqrt()[..., None, :], axes * size.sqrt()[..., None, :]
    share = to_white.mT @ (overshoot / scale) @ to_white
    amount, rotation = torch.linalg.eigh((share + share.mT) / 2)
    taken = from_white @ rotation
    kept = jackknife - scale * (taken * amount.clamp(0, _LARGEST_SHARE)[..., None, :] @ taken.mT)
    missing = (1 - _LARGEST_SHARE) * spread.square() - kept.diagonal(dim1=-2, dim2=-1)  # rounding of what is singular
    return kept + torch.diag_embed(missing.clamp(min=0))
