"""The frozen records of the estimation: what a refresh leaves behind, and what is estimated from it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Status = Literal["clear", "conflict", "undetermined"]
T = TypeVar("T")


@dataclass(frozen=True)
class ProbeGram:
    """All that one refresh leaves behind: inner products of the 2m sketched score sums, and the counts.

    The tensors must not be written into: statistics of the probe are computed once and kept with it.

    Attributes:
        gram: [2m, 2m] float64, inner products of [S+_1..S+_m, S-_1..S-_m], where S+ (S-) is the sum of
            score vectors grad log pi(y_i|x) over the correct (wrong) samples of a prompt.
        num_samples: [m] int64, samples with a verdict.
        num_correct: [m] int64.
        prompt_keys: m hashable names of the prompts. The jackknife leaves a prompt out of all refreshes in which its
            key occurs. Prompts of one name in one refresh are a cluster: they are not paired, and are left out
            together. Empty: all prompts are different.
        misses: None for fresh samples. For samples of an earlier policy, whose scores enter the sums times their
            importance ratios: [m, n] float64 of `importance.miss_estimates`. The counts are those of the sampling.
        corrected: True where the samples are fresh, and `misses` correct for another engine than the model's own.
    """

    gram: Tensor
    num_samples: Tensor
    num_correct: Tensor
    prompt_keys: Sequence[Any] = ()
    misses: Tensor | None = None
    corrected: bool = False

    @property
    def reused(self) -> bool:
        """Whether the samples are those of an earlier refresh."""
        return self.misses is not None and not self.corrected

    def share_weighted(self, k: int) -> float:
        """Share of the prompts with a sample of non-zero pass@k advantage: 0 < c < n and n - c >= k - 1.

        The leave-one-out weight W(c - 1) of a right sample is k C(n - c, k - 1)/C(n - 1, k - 1), 0 where fewer than
        k - 1 samples are wrong. With n = k it takes c = 1.
        """
        n, c = self.num_samples, self.num_correct
        return float(((c > 0) & (c < n) & (n - c >= k - 1)).double().mean())

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `make()`, computed at the first request for `key`.

        The value must not refer to this probe, or the memory of the Gram matrix is freed late.
        """
        kept: dict[Hashable, T] = vars(self).setdefault("_kept", {})  # no field: it is not saved and not compared
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def converted(self, gram: Tensor, num_samples: Tensor, num_correct: Tensor, misses: Tensor | None) -> ProbeGram:
        """The same probe in other dtypes. Both share what is kept."""
        other = ProbeGram(gram, num_samples, num_correct, self.prompt_keys, misses, self.corrected)
        vars(other)["_kept"] = vars(self).setdefault("_kept", {})
        return other


@dataclass(frozen=True)
class ConflictCurve:
    """cos(grad J_k, grad J_1) for each k from one set of Gram matrices: K entries each.

    Attributes:
        k: [K] int64.
        cosine, ci_low, ci_high: [K] float64, the interval for each k by itself; NaN where no cosine can be ruled out.
        established: [K] bool, True where a conflict is established at the stated confidence at this k by itself.
        band_low, band_high: [K] float64 of the band that holds at all k together, -1 and 1 where nothing is ruled out.
    """

    k: Tensor
    cosine: Tensor
    ci_low: Tensor
    ci_high: Tensor
    established: Tensor
    band_low: Tensor
    band_high: Tensor


@dataclass(frozen=True)
class ConflictEstimate:
    """The conflict between grad J_k and grad J_1 with its uncertainty (arXiv 2602.21189, Sec. 4).

    A number is None where the probe does not determine it. Per-prompt tensors describe the newest refresh.

    Attributes:
        k: the k of pass@k.
        status: "conflict" when the whole interval is below the threshold, "clear" when it is above, else
            "undetermined".
        reason: why the status is what it is, in one sentence.
        cosine: U_k1 / sqrt(U_11 U_kk) less its bias to second order, in [-1, 1].
        standard_error: over prompts, of `cosine`.
        ci_low, ci_high: two-sided interval at `confidence`, which decides the status.
        confidence: e.g. 0.95.
        inner_product, norm1_sq, normk_sq: U-statistics of <grad J_k, grad J_1>, |grad J_1|^2, |grad J_k|^2.
        inner_product_se: standard error of `inner_product`; degrees: of freedom that it has.
        mean_weighted_agreement: E[w a], which equals <grad J_k, grad J_1> (the same number as `inner_product`).
        mean_weight: E[w_k], estimated without bias. weight_agreement_cov: cov(w, a) = E[w a] - E[w] E[a]. Both over
            the pooled refreshes with fresh samples; None where the newest has none.
        agreement: [m] a(x) = mean over x' != x of <g_1(x), g_1(x')>.
        weighted_agreement: [m] the same with g_k(x) on the left: the share of prompt x in the conflict.
        kernel: [m, m] <g_1(x), g_1(x')>, the estimated similarity kernel.
        frac_negative_pairs: share of off-diagonal kernel entries below zero, among prompts with signal.
        pass_at_1, pass_at_k: unbiased pass rates, and their standard errors over prompts; None where the newest
            refresh has no fresh samples.
        num_prompts: prompts over all pooled refreshes; num_informative: those with 0 < c < n.
        num_refreshes: refreshes pooled.
        k_star: largest k up to which no conflict is established; None when undetermined.
        k_star_low, k_star_high: confidence set of the largest k up to which there is none, from the band. The curve's
            last k stands for that one and all above.
        curve: the same cosine for every k the samples allow.
        naive_cosine: comparison only, biased towards "no conflict": all pairs, same-prompt ones included.
    """

    k: int
    status: Status
    reason: str
    confidence: float
    threshold: float
    num_prompts: int
    num_informative: int
    num_refreshes: int
    cosine: float | None = None
    standard_error: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    inner_product: float | None = None
    inner_product_se: float | None = None
    degrees: float | None = None
    norm1_sq: float | None = None
    normk_sq: float | None = None
    mean_weighted_agreement: float | None = None
    mean_weight: float | None = None
    weight_agreement_cov: float | None = None
    frac_negative_pairs: float | None = None
    pass_at_1: float | None = None
    pass_at_1_se: float | None = None
    pass_at_k: float | None = None
    pass_at_k_se: float | None = None
    k_star: int | None = None
    k_star_low: int | None = None
    k_star_high: int | None = None
    naive_cosine: float | None = None
    agreement: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    weighted_agreement: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    kernel: Tensor = field(default_factory=lambda: torch.empty(0, 0), repr=False)
    curve: ConflictCurve | None = field(default=None, repr=False)
