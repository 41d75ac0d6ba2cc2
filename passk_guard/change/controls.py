r"""Control variates whose coefficients are fitted on the other prompts, so that nothing is biased. Needs torch alone.

A prompt's change D and its controls T, of expectation 0, give $D - \beta T$, of the same expectation as D for every
$\beta$ that does not look at this prompt. So each prompt takes the ridge regression of D on T over the others
(cross-fitting; Owen 2013, *Monte Carlo theory, methods and examples*, Sec. 8.9, for the regression). The start is the
leave-one-out form, from which few prompts hardly move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from passk_guard.change.per_prompt import PromptChanges

_FEWEST_PROMPTS = 8
_STRENGTH_1 = 2.0
_STRENGTH_K = 64.0
"""Prompts that the leave-one-out forms count for. The fit for pass@1 has the samples of a prompt one by one, that for
pass@k their sum alone: with less weight on its start, 95% intervals of pass@k cover up to 5% less."""

_LARGEST = 1.0
"""Coefficients multiply weights and rates, and from one known form to another they change by 1."""


def adjusted(prompts: PromptChanges) -> tuple[Tensor, Tensor]:
    """[m] change of p and of 1-(1-p)^k for each prompt, less their fitted controls; NaN where `change_k` is.

    pass@1 takes h = 1 and b and fits them sample by sample: the off-diagonal products it leaves out are smaller by
    1/n. pass@k is no sum over samples, and takes all four controls of each prompt as they are.
    """
    one, many = prompts.change_1, prompts.change_k.clone()
    if len(one) >= _FEWEST_PROMPTS:
        features = prompts.step[..., None] * torch.stack([torch.ones_like(prompts.baseline), prompts.baseline], -1)
        slope = fitted_on_others(prompts.step * prompts.advantage, features, prompts.size, _STRENGTH_1)
        one = one - (slope * prompts.controls[:, :2]).sum(1)
    enough = ~many.isnan()
    if int(enough.sum()) >= _FEWEST_PROMPTS and bool(many[enough].isfinite().all()):
        controls = prompts.controls[enough]
        slope = fitted_on_others(many[enough, None], controls[:, None], torch.ones(len(controls)), _STRENGTH_K)
        many[enough] -= (slope * controls).sum(1)
    return one, many


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
