"""The conflict of a known population: the paper's quantities from exact gradients and pass rates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from passk_guard.passk.closed_forms import passk_weight
from passk_guard.utils.errors import GuardError


@dataclass(frozen=True)
class PopulationConflict:
    """The paper's quantities over a finite population of prompts (arXiv 2602.21189, Sec. 4).

    Attributes:
        inner_product: <grad J_k, grad J_1> = E[w_k a].
        norm1, normk: |grad J_1|, |grad J_k|.
        cosine: of the angle between them.
        agreement: [m] a(x) = E_x' kappa(x, x'), prompt x included.
        weight: [m] w_k(p(x)).
        mean_weight: E[w_k]; weight_agreement_cov: cov(w_k, a).
        mixing: the smallest lambda >= 0 at which grad J_k + lambda grad J_1 no longer conflicts. Adding lambda to
            every prompt weight has the same effect.
    """

    inner_product: float
    norm1: float
    normk: float
    cosine: float
    agreement: Tensor
    weight: Tensor
    mean_weight: float
    weight_agreement_cov: float
    mixing: float


def population_conflict(
    kernel: Tensor, pass_rate: Tensor, k: float, prompt_probability: Tensor | None = None
) -> PopulationConflict:
    r"""Conflict between grad J_k and grad J_1 when p(x) and grad p(x) are known for every prompt.

    $\langle \nabla J_k, \nabla J_1 \rangle = E[w_k a] = E[w_k] |\nabla J_1|^2 + cov(w_k, a)$
    (arXiv 2602.21189, Sec. 4). Same-prompt pairs are included, since nothing here is sampled.

    Args:
        kernel: [m, m] similarity kernel kappa(x, x') = <grad p(x), grad p(x')>.
        pass_rate: [m] p(x) in [0, 1].
        k: real and at least 1.
        prompt_probability: [m] weights that sum to 1; None for uniform.

    Raises:
        GuardError: shapes that do not fit, or probabilities that do not sum to 1.
    """
    p = pass_rate.double()
    kappa = kernel.double()
    m = p.numel()
    if kappa.shape != (m, m):
        raise GuardError(f"Expected `kernel` of shape ({m}, {m}) for {m} pass rates; found {tuple(kappa.shape)}.")
    q = torch.full_like(p, 1 / m) if prompt_probability is None else prompt_probability.double()
    if q.shape != p.shape or abs(float(q.sum()) - 1) > 1e-6:
        raise GuardError("Expected `prompt_probability` of the shape of `pass_rate`, summing to 1.")
    weight = passk_weight(p, k)
    agreement = kappa @ q
    weighted = q * weight
    inner = float(weighted @ agreement)
    norm1_sq = max(0.0, float(q @ agreement))
    normk_sq = max(0.0, float(weighted @ kappa @ weighted))
    mean_weight = float(weighted.sum())
    scale = (norm1_sq * normk_sq) ** 0.5
    return PopulationConflict(
        inner_product=inner,
        norm1=norm1_sq**0.5,
        normk=normk_sq**0.5,
        cosine=inner / scale if scale > 0 else float("nan"),
        agreement=agreement,
        weight=weight,
        mean_weight=mean_weight,
        weight_agreement_cov=inner - mean_weight * norm1_sq,
        mixing=max(0.0, -inner / norm1_sq) if norm1_sq > 0 else float("nan"),
    )
