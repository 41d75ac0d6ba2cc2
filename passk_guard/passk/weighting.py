"""Two advantages per group, one for its correct and one for its wrong samples, and the prompt weight that they give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from passk_guard.utils.errors import GuardError


@dataclass(frozen=True)
class Weighting:
    r"""An objective for 0/1 rewards, as the weight that its advantages give a prompt.

    For each prompt, n completions are sampled and c of them are correct. A correct one gets $A^+(n, c)$, a wrong one
    $A^-(n, c)$. With S+ (S-) the sum of score vectors over the correct (wrong) samples, the gradient estimate is
    $g = \frac{1}{n}(A^+ S^+ + A^- S^-)$, and $E[g] = W_n(p) \nabla p$ for *any* such pair, since
    $E[S^+ | c] = c \nabla p / p$ and $E[S^- | c] = -(n-c) \nabla p / (1-p)$.

    Clipping, a KL term and normalisation by length are left to the trainer.

    Attributes:
        name: spec that `named_weighting` turns back into the same weighting; with the size of its groups, if it has.
        population_weight: p -> limit of W_n(p) as n grows, elementwise on a float tensor of pass rates in [0, 1];
            infinite where that limit is.
        advantages: (n, c) -> (A+, A-), float64 tensors that broadcast, n >= fewest_samples. `coefficients` replaces
            A+ by 0 where c = 0, and A- where c = n.
        fewest_samples: smallest n for which the advantages are defined.
    """

    name: str
    population_weight: Callable[[Tensor], Tensor]
    advantages: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    fewest_samples: int

    def coefficients(self, num_samples: Tensor, num_correct: Tensor) -> tuple[Tensor, Tensor]:
        r"""The two numbers of $g = \alpha^+ S^+ + \alpha^- S^-$, i.e. $\alpha^\pm = A^\pm(n, c) / n$.

        Args:
            num_samples: n, any shape; 0 for a prompt without samples.
            num_correct: c, broadcasts with n.

        Returns:
            alpha+ and alpha-, float64, of the broadcast shape. alpha+ is 0 where c = 0, alpha- where c = n.

        Raises:
            GuardError: 0 < n < fewest_samples somewhere, or c outside 0..n.
        """
        n, c = torch.broadcast_tensors(torch.as_tensor(num_samples).double(), torch.as_tensor(num_correct).double())
        if not bool(((c >= 0) & (c <= n)).all()):
            raise GuardError("Expected 0 <= `num_correct` <= `num_samples`; found a count outside.")
        self._check_samples(n[n > 0])
        used = torch.where(n > 0, n, float(self.fewest_samples))
        positive, negative = self.advantages(used, c)
        return torch.where(c > 0, positive / used, 0.0), torch.where(c < n, negative / used, 0.0)

    def effective_weight(self, pass_rate: Tensor, num_samples: int) -> Tensor:
        r"""W_n(p), the exact expectation of the weight on $\nabla p$ that groups of n samples give.

        $W_n(p) = E[\frac{c}{n} A^+(n, c)] / p - E[\frac{n-c}{n} A^-(n, c)] / (1-p)$ with c ~ Bin(n, p), written so
        that nothing is divided by p or 1-p: $E_{c' \sim Bin(n-1, p)}[A^+(n, c'+1) - A^-(n, c')]$, where c' counts
        the correct among the *other* samples.

        Args:
            pass_rate: p in [0, 1], any shape.
            num_samples: n >= fewest_samples.

        Returns:
            float64 of p's shape; finite, also at p = 0 and p = 1.

        Raises:
            GuardError: n < fewest_samples, or p outside [0, 1].
        """
        p = torch.as_tensor(pass_rate).double()
        if not bool(((p >= 0) & (p <= 1)).all()):
            raise GuardError("Expected `pass_rate` in [0, 1]; found a value outside.")
        n = torch.tensor(float(num_samples), dtype=torch.float64, device=p.device)
        self._check_samples(n)
        others = torch.arange(num_samples, dtype=torch.float64, device=p.device)
        gap = self.advantages(n, others + 1)[0] - self.advantages(n, others)[1]
        return (_binomial(num_samples - 1, others, p[..., None]) * gap).sum(-1)

    def in_groups_of(self, size: int) -> Weighting:
        r"""The same objective in groups of `size` samples, for prompts of which more were sampled.

        The advantage of a sample is its mean over all groups of the n samples that hold it. The others of a correct
        one are `size` - 1 of n - 1 samples with c - 1 correct: $\sum_j P(j) A^+(size, j + 1)$ with P hypergeometric.
        So the weight is $W_{size}(p)$ whatever n is. Prompts of at most `size` samples keep what they have.

        Raises:
            GuardError: size < fewest_samples.
        """
        self._check_samples(torch.tensor([float(size)], dtype=torch.float64))
        others = torch.arange(size, dtype=torch.float64)  # j correct ones among those beside the sample

        def advantages(n: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            n, c = torch.broadcast_tensors(n, c)
            positive, negative = self.advantages(n, c)
            many = n > size
            rest, right = torch.where(many, n, size + 1.0)[..., None] - 1, torch.where(many, c, 0.0)[..., None]
            fixed = torch.full_like(others, float(size))
            if_right = _hypergeometric(rest, (right - 1).clamp(min=0), others, size - 1)
            if_wrong = _hypergeometric(rest, right.minimum(rest), others, size - 1)
            mean_positive = (if_right * self.advantages(fixed, others + 1)[0]).sum(-1)
            mean_negative = (if_wrong * self.advantages(fixed, others)[1]).sum(-1)
            return torch.where(many, mean_positive, positive), torch.where(many, mean_negative, negative)

        name = f"{self.name} in groups of {size}"
        return Weighting(name, self.population_weight, advantages, self.fewest_samples)

    def _check_samples(self, n: Tensor) -> None:
        if n.numel() and float(n.min()) < self.fewest_samples:
            raise GuardError(
                f"Expected `num_samples` >= {self.fewest_samples} for {self.name!r}; found num_samples={n.min():g}. "
                "Its advantages are not defined there: sample more, or leave the prompt out."
            )


def centred(
    name: str,
    scale: Callable[[Tensor, Tensor], Tensor],
    population_weight: Callable[[Tensor], Tensor],
    fewest_samples: int = 2,
) -> Weighting:
    r"""A weighting with $A = s(n, c)(r - c/n)$: the group's mean as the baseline, and one factor for the whole group.

    Most published advantages have this form. s is computed where 0 < c < n only; any other group has advantage 0
    throughout.

    Args:
        name, population_weight, fewest_samples: of the `Weighting`. A group of one sample has no mean to differ from.
        scale: (n, c) -> s(n, c).
    """

    def advantages(n: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        mixed = (c > 0) & (c < n)
        s = torch.where(mixed, scale(n, torch.where(mixed, c, 1.0)), 0.0)
        return s * (1 - c / n), -s * c / n

    return Weighting(name, population_weight, advantages, fewest_samples)


def _hypergeometric(total: Tensor, right: Tensor, found: Tensor, drawn: int) -> Tensor:
    """Probability of `found` right ones among `drawn` of `total` without replacement, `right` of which are right."""
    wrong, missed = total - right, drawn - found
    possible = (found <= right) & (missed <= wrong)

    def log_ways(all_of: Tensor, some: Tensor) -> Tensor:
        some = torch.where(possible, some, 0.0)
        return torch.lgamma(all_of + 1) - torch.lgamma(some + 1) - torch.lgamma(all_of - some + 1)

    ways = log_ways(right, found) + log_ways(wrong, missed)
    whole = torch.lgamma(total + 1) - math.lgamma(drawn + 1) - torch.lgamma(total - drawn + 1)
    return torch.where(possible, (ways - whole).exp(), 0.0)


def _binomial(trials: int, successes: Tensor, p: Tensor) -> Tensor:
    """Bin(trials, p) at each count of successes, with 0^0 = 1."""
    failures = trials - successes
    ways = math.lgamma(trials + 1) - torch.lgamma(successes + 1) - torch.lgamma(failures + 1)
    return torch.exp(ways + torch.special.xlogy(successes, p) + torch.special.xlog1py(failures, -p))
