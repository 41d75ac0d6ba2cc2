"""Inner products between prompts' gradients, from one Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.ustatistics import coefficients

Coefficients = tuple[Tensor, Tensor]


def at_k(probe: ProbeGram, k: int) -> Coefficients:
    """[m] and [m]: what S+ and S- of each prompt are multiplied with to give the leave-one-out g_k."""
    positive, negative = coefficients(probe, torch.tensor([k])).view(2, -1)
    return positive, negative


def kernel_of(probe: ProbeGram, left: Coefficients, right: Coefficients) -> Tensor:
    """[m, m] inner products <g(x), h(x')>, g and h given by their coefficients of S+ and S-."""
    m = probe.num_samples.numel()
    weighted = torch.cat(left)[:, None] * probe.gram * torch.cat(right)[None, :]
    return weighted.view(2, m, 2, m).sum((0, 2))


def off_diagonal_rows(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """[m] mean of each row without its diagonal entry, and the standard error of that mean over the other prompts."""
    m = kernel.shape[0]
    others = kernel - torch.diag(kernel.diagonal())
    means = others.sum(1) / (m - 1)
    squares = (others.square().sum(1) - (m - 1) * means.square()).clamp(min=0)
    return means, (squares / ((m - 1) * max(m - 2, 1))).sqrt()


def mixed(probe: ProbeGram) -> Tensor:
    """[m] bool: prompts with right and wrong samples both; the others have no gradient estimate but zero."""
    return (probe.num_correct > 0) & (probe.num_correct < probe.num_samples)
