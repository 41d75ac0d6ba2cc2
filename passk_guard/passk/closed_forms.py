"""Closed forms of pass@k: rates, weights, advantages, the conflict of a known population. Needs torch alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from passk_guard.utils.arguments import as_counts, as_real, together
from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import brief

_TERMS_PER_CHUNK = 1024
_ROUNDING = 1e-6


def pass_at_k(num_samples: Tensor | int, num_correct: Tensor | int, k: Tensor | int) -> Tensor:
    r"""Unbiased estimate of pass@k, the chance that at least one of k samples is right.

    $1 - \binom{n-c}{k} / \binom{n}{k}$, computed as a sum of $\min(k, c)$ logarithms, so that neither large n nor
    small rates lose digits (n up to 1e5). Source: Codex, arXiv 2107.03374, Eq. 1.

    Args:
        num_samples: n, samples of each prompt; any shape that broadcasts with the others.
        num_correct: c, how many of them are correct, 0 <= c <= n.
        k: 1 <= k <= n.

    Returns:
        float64 tensor of the broadcast shape, in [0, 1].

    Raises:
        GuardError: k > n (no unbiased estimate exists there), k < 1, or c outside 0..n.
    """
    given = [as_counts(v, name) for v, name in ((num_samples, "num_samples"), (num_correct, "num_correct"), (k, "k"))]
    device = next((t.device for t in given if t.ndim), given[0].device)
    n, c, k = together(*(t.to(device) for t in given))
    check_k(n, k)
    if bool(((c < 0) | (c > n)).any()):
        raise GuardError("Expected 0 <= `num_correct` <= `num_samples`; found a count outside.")
    return torch.expm1(_log_miss(n, c, k)).abs()  # and no -0.0


def passk_weight(pass_rate: Tensor, k: int | float | Tensor) -> Tensor:
    r"""Weight of a prompt's gradient in grad J_k: $w_k(p) = k (1-p)^{k-1}$ (arXiv 2602.21189, Sec. 3).

    Args:
        pass_rate: p in [0, 1], any shape.
        k: real and at least 1; broadcasts.

    Returns:
        Tensor of the broadcast shape, in [0, k].

    Raises:
        GuardError: a rate outside [0, 1] by more than rounding, or k < 1.
    """
    p, size = pass_rate, k if isinstance(k, Tensor) else torch.tensor(as_real(k, "k"))
    in_range = bool(((p >= -_ROUNDING) & (p <= 1 + _ROUNDING)).all())
    if not in_range or not bool(((size >= 1) & size.isfinite()).all()):
        raise GuardError(f"Expected `pass_rate` in [0, 1] and a finite k >= 1; found {brief(p)} and {brief(k)}.")
    return k * (1 - p).clamp(0, 1) ** (k - 1)


def unbiased_passk_weight(num_samples: Tensor, num_correct: Tensor, k: int | Tensor) -> Tensor:
    r"""Unbiased estimate of w_k(p) from n samples: $k \binom{n-c}{k-1} / \binom{n}{k-1}$.

    Args:
        num_samples: n, any shape. num_correct: c in 0..n, same shape. Neither is checked.
        k: 1 <= k <= n + 1.

    Returns:
        float64 tensor, in [0, k].
    """
    n, c, wanted = _in_float64(num_samples, num_correct, k)
    return wanted * torch.exp(_log_miss(n, c, wanted - 1))


def sample_coefficients(
    num_samples: Tensor,
    num_correct: Tensor,
    k: int | Tensor,
    *,
    floor: float | Tensor | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The two numbers that turn score sums into a prompt's pass@k gradient.

    With S+ (S-) the sum of score vectors over the correct (wrong) samples,
    $g_k = \alpha^+ S^+ + \alpha^- S^-$ is unbiased for $w_k(p) \nabla p$, where
    $\alpha^+ = f(W(c-1)) (1 - \frac{c-1}{n-1}) / n$, $\alpha^- = -f(W(c)) \frac{c}{n-1} / n$,
    $W(c') = k \binom{n-1-c'}{k-1} / \binom{n-1}{k-1}$ is the weight as seen from the n - 1 *other* samples, of which
    c' are correct, and f clips to [floor, cap]. Weight and baseline do not depend on the sample they multiply.

    Args:
        num_samples: n, any shape. A single sample (n = 1, so k = 1) has no others, and its baseline is 0.
        num_correct: c in 0..n, same shape.
        k: 1 <= k <= n wherever n > 0, broadcasts. None of the three is checked.
        floor, cap: bounds on the weight, floor <= cap; None for none. With them the estimate is unbiased for
            $E[f(W)] \nabla p$ instead. Several floors as a tensor that broadcasts with the others.

    Returns:
        alpha+ and alpha-, float64. alpha+ is 0 where c = 0, and alpha- where c = n; where n = 0 both are 0.
    """
    n, c, wanted = _in_float64(num_samples, num_correct, k)
    others = (n - 1).clamp(min=0)

    def weight(correct_others: Tensor) -> Tensor:
        subset = torch.minimum(wanted - 1, others)
        w = wanted * torch.exp(_log_miss(others, torch.minimum(correct_others, others), subset))
        w = w if floor is None else torch.maximum(w, torch.as_tensor(floor, dtype=w.dtype, device=w.device))
        return w if cap is None else w.clamp(max=cap)

    others_or_1, n_or_1, c_above = others.clamp(min=1), n.clamp(min=1), (c - 1).clamp(min=0)
    positive = weight(c_above) * (1 - c_above / others_or_1) / n_or_1
    negative = -weight(c) * (c / others_or_1) / n_or_1
    return torch.where(c > 0, positive, 0.0), torch.where((c < n) & (n > 1), negative, 0.0)


def passk_advantages(
    correct: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    floor: float | None = None,
    cap: float | None = None,
    hold: float = 0.0,
) -> Tensor:
    r"""Advantages whose policy gradient is the pass@k gradient.

    $A_i = f(W_i)(r_i - b_i)$ with leave-one-out weight and baseline (`sample_coefficients`), so that
    $\frac{1}{n}\sum_i A_i \nabla \log \pi(y_i)$ is an unbiased estimate of $w_k(p) \nabla p$. k = 1 is RLOO.

    Args:
        correct: [m, n] of 0/1 (bool, int or float), n samples for each of m prompts.
        k: 1 <= k <= n.
        mask: [m, n] bool, False where a sample has no verdict. Its advantage is 0, and n counts the samples of its
            prompt that are left, over which the mean is taken. A prompt without any gets zeros.
        floor, cap: clip the weight to [floor, cap]; None for no bound.
        hold: multiplier of the pass@1 advantages that are added, `HoldController`'s: $A_k + \lambda A_1$, divided by
            lambda where it is above 1, so that a large one turns the step and does not make it longer.

    Returns:
        [m, n] tensor: correct's dtype where it is floating, else torch's default float.

    Raises:
        GuardError: k larger than the samples of a prompt, values other than 0/1, a negative `hold`, or shapes that
            do not fit.
    """
    if not isinstance(correct, Tensor) or correct.is_complex() or correct.ndim != 2:
        found = tuple(correct.shape) if isinstance(correct, Tensor) else type(correct).__name__
        raise GuardError(f"Expected `correct` to be a real tensor of shape [prompts, samples]; found {found}.")
    valid = torch.ones_like(correct, dtype=torch.bool) if mask is None else mask.bool()
    if valid.shape != correct.shape:
        raise GuardError(f"Expected `mask` of shape {tuple(correct.shape)}; found {tuple(valid.shape)}.")
    if not bool(((correct == 0) | (correct == 1) | ~valid).all()):
        raise GuardError("Expected `correct` to hold 0 and 1 only; compare your rewards with a threshold first.")
    right = (correct == 1) & valid
    num_samples, num_correct = valid.sum(1), right.sum(1)
    check_k(num_samples[num_samples > 0], as_counts(k, "k"))
    floor, cap = (None if v is None else as_real(v, name) for v, name in ((floor, "floor"), (cap, "cap")))
    if math.isnan(floor or 0.0) or not (cap is None or max(floor or 0.0, 0.0) <= cap):
        raise GuardError(f"Expected a number `floor` <= `cap`, and `cap` >= 0; found {floor=}, {cap=}.")
    if not 0 <= as_real(hold, "hold") < math.inf:
        raise GuardError(f"Expected `hold` >= 0 and finite, a multiplier of the pass@1 advantages; found {hold}.")
    positive, negative = sample_coefficients(num_samples, num_correct, k, floor=floor, cap=cap)
    if hold:
        positive_1, negative_1 = sample_coefficients(num_samples, num_correct, 1)
        longest = max(1.0, hold)
        positive, negative = (positive + hold * positive_1) / longest, (negative + hold * negative_1) / longest
    advantages = torch.where(right, positive[:, None], negative[:, None]) * num_samples[:, None]
    dtype = correct.dtype if correct.is_floating_point() else torch.get_default_dtype()
    return torch.where(valid, advantages, 0.0).to(dtype)


def _in_float64(n: Tensor | int, c: Tensor | int, k: Tensor | int) -> tuple[Tensor, ...]:
    """The three counts in one shape, on the device of n."""
    n = torch.as_tensor(n)
    return torch.broadcast_tensors(*(torch.as_tensor(x, device=n.device).double() for x in (n, c, k)))


def _log_miss(n: Tensor, c: Tensor, k: Tensor) -> Tensor:
    """log of C(n-c, k) / C(n, k), the chance that a k-subset of n samples misses all c correct ones."""
    # The ratio is symmetric in c and k; the product over the smaller one has fewer factors.
    fewer, more = torch.minimum(c, k), torch.maximum(c, k)
    total = torch.zeros_like(n)
    most = int(fewer.max()) if fewer.numel() else 0
    for start in range(0, most, _TERMS_PER_CHUNK):
        j = torch.arange(start, min(start + _TERMS_PER_CHUNK, most), device=n.device, dtype=n.dtype)
        factor = -more[..., None] / (n[..., None] - j).clamp(min=1)
        total = total + torch.where(j < fewer[..., None], torch.log1p(factor.clamp(min=-1)), 0.0).sum(-1)
    return torch.where(n - c < k, -torch.inf, total)


def check_k(n: Tensor, k: Tensor) -> None:
    """Raise GuardError unless 1 <= k <= n everywhere."""
    if bool((k < 1).any()):
        raise GuardError(f"Expected `k` >= 1; found k={int(k.min())}.")
    n, k = torch.broadcast_tensors(n, k.to(n.device))
    if bool((n < k).any()):
        at = int((n < k).flatten().nonzero()[0])
        raise GuardError(
            f"Expected `num_samples` >= k; found num_samples={int(n.flatten()[at])}, k={int(k.flatten()[at])}. No "
            "unbiased estimate exists above n: raise `num_samples` or lower `k`."
        )


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
