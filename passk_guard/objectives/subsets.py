"""Objectives that reward k samples together if any of them is right."""

from __future__ import annotations

from torch import Tensor

from passk_guard.objectives.weighting import Weighting, centred, check_finite, shortest
from passk_guard.passk import pass_at_k, passk_weight, sample_coefficients, unbiased_passk_weight
from passk_guard.utils.errors import GuardError


def passk(k: int, floor: float | None = None, cap: float | None = None) -> Weighting:
    r"""pass@k with leave-one-out weight and baseline: the advantages of `passk_advantages`.

    Population weight $f(w_k(p))$, $w_k(p) = k(1-p)^{k-1}$, f the clip to [floor, cap]. Without bounds n samples give
    exactly w_k(p), without bias; with them the mean of f over what n - 1 samples see of w_k.
    Source: arXiv 2602.21189, Sec. 3 (the weight); `sample_coefficients` (the estimator).

    Args:
        k: at least 1.
        floor, cap: bounds on the weight, at least 0; None for none.

    Raises:
        GuardError: k not a whole number of at least 1, a bound that is negative or not finite, or floor > cap.
    """
    _check_k(k)
    for bound, value in (("floor", floor), ("cap", cap)):
        if value is not None:
            check_finite(bound, value, least=0)
    if floor is not None and cap is not None and floor > cap:
        raise GuardError(f"Expected `floor` <= `cap`; found floor={floor}, cap={cap}.")

    def advantages(n: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        positive, negative = sample_coefficients(n, c, k, floor=floor, cap=cap)
        return n * positive, n * negative

    def population_weight(p: Tensor) -> Tensor:
        w = passk_weight(p, k)
        return w if floor is None and cap is None else w.clamp(min=floor, max=cap)

    bounds = {"floor": floor, "cap": cap}
    more = "".join(f",{bound}={shortest(value)}" for bound, value in bounds.items() if value is not None)
    return Weighting(f"passk:{k}{more}", population_weight, advantages, k)


def passk_training(k: int) -> Weighting:
    r"""Pass@k Training: a sample's mean reward over the k-subsets that hold it, group-normalised.

    With $\bar R = 1 - \binom{n-c}{k} / \binom{n}{k}$ and $\sigma = \sqrt{\bar R (1 - \bar R)}$, mean and standard
    deviation of the reward over all k-subsets, $A^+ = (1 - \bar R) / \sigma$ and
    $A^- = (1 - \bar R - \binom{n-c-1}{k-1} / \binom{n-1}{k-1}) / \sigma$. Both equal
    $s (r - \bar r)$ with $s = \frac{n}{n-c} \sqrt{(1 - \bar R) / \bar R}$, which is how they are computed. Zero where
    sigma = 0, i.e. for c = 0 and for n - c < k; so with n = k nothing is ever learnt.

    Population weight $w_k(p) / (k \sigma) = (1-p)^{k/2-1} / \sqrt{1 - (1-p)^k}$. The normalisation takes back much
    of what pass@k asks for: k = 1 is GRPO's weight, k = 2 still gives weight 1 at p = 1, and near p = 0 the weight
    grows as $1/\sqrt{kp}$, the *less* the larger k is. n samples stop at $\sqrt{(n-k)/k}$ there.
    Source: arXiv 2508.10751, Sec. 2.4 and its appendix; the weight is derived from them. The authors' code adds
    1e-6 to sigma, which is left out here.

    Args:
        k: at least 1.

    Raises:
        GuardError: k not a whole number of at least 1.
    """
    _check_k(k)

    def scale(n: Tensor, c: Tensor) -> Tensor:
        missed = unbiased_passk_weight(n, c, k + 1) / (k + 1)  # 1 - pass_at_k, with its digits where it is small
        return n / (n - c) * (missed / pass_at_k(n, c, k)).sqrt()

    def population_weight(p: Tensor) -> Tensor:
        return (1 - p) ** (k / 2 - 1) / (1 - (1 - p) ** k).sqrt()

    return centred(f"passk_training:{k}", scale, population_weight, fewest_samples=k)


def _check_k(k: int) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise GuardError(f"Expected `k` to be a whole number >= 1; found {k!r}.")
