"""From Gram matrices to the conflict between pass@k and pass@1, with its uncertainty. Needs torch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from passk_guard.estimation.agreement import informative, informative_clusters, prompt_view, weight_and_agreement
from passk_guard.estimation.band import level_of_each
from passk_guard.estimation.gram import checked_probe
from passk_guard.estimation.intervals import corrected_cosine, cosine_bounds, student_t_quantile
from passk_guard.estimation.records import ConflictCurve, ConflictEstimate, ProbeGram, Status
from passk_guard.estimation.ustatistics import (
    Moments,
    cluster_sizes,
    clusters,
    passk_rows,
    pooled_moments,
    weighting_rows,
)
from passk_guard.passk import Weighting
from passk_guard.passk.closed_forms import pass_at_k
from passk_guard.utils.arguments import as_real
from passk_guard.utils.clusters import error_parts
from passk_guard.utils.errors import GuardError

_FEWEST_PROMPTS = 3  # two give a U-statistic of one pair, and no jackknife

FEWEST_EFFECTIVE = 8.0
"""Prompts behind a squared norm (`Moments.effective_prompts`) below which no number is shown. A norm that few prompts
carry is large just where the sample happens to be unlike others (benchmarks/README.md, Calibration)."""


def estimate_conflict(
    gram: Tensor,
    num_samples: Tensor,
    num_correct: Tensor,
    k: int,
    *,
    threshold: float = 0.0,
    confidence: float = 0.95,
    history: Sequence[ProbeGram] = (),
    prompt_keys: Sequence[object] = (),
    weighting: Weighting | None = None,
) -> ConflictEstimate:
    r"""Estimate cos(grad J_k, grad J_1) from the Gram matrix of per-prompt score sums.

    Prompt-level U-statistics $U_{kl} = \frac{1}{m(m-1)}\sum_{x \ne x'} \langle g_k(x), g_l(x')\rangle$ with the
    leave-one-out $g_k(x) = \alpha^+_k S^+_x + \alpha^-_k S^-_x$ are unbiased for the inner products of
    arXiv 2602.21189, Sec. 4; the cosine is $U_{k1} / \sqrt{U_{11} U_{kk}}$. Same-prompt pairs are left out: with
    them the statistic is biased towards "no conflict" by the noise of one prompt's gradient. Uncertainty is a
    jackknife over prompts, turned into bounds on the cosine by `intervals.cosine_bounds`. The intervals hold for
    prompts that are independent of one another, or whose clusters are named in `prompt_keys`.

    Args:
        gram: [2m, 2m] inner products of [S+_1..S+_m, S-_1..S-_m], S being *sums* of score vectors.
        num_samples: [m] samples with a verdict, each at least k.
        num_correct: [m] correct ones.
        k: of pass@k, at least 2 for the angle to mean anything (k = 1 gives cosine 1).
        threshold: cosine below which there is a conflict.
        confidence: of the interval. The status is "conflict" where all of it is below the threshold, and "clear" where
            all of it is above.
        history: Gram matrices of earlier refreshes, pooled with this one by averaging the U-statistics.
        prompt_keys: m hashable names, by which a prompt is recognised in `history`. Prompts of one name, such as
            paraphrases of one problem, are a cluster: they are not paired, and count as one.
        weighting: another objective in place of pass@k, e.g. `named_weighting("grpo")`. g_k is then the gradient that
            its advantages give for the same samples, and there is no curve over k. k still names the pass rate.

    Returns:
        A `ConflictEstimate`. Per-prompt fields and pass rates describe this refresh. The other numbers are pooled:
        E[w] and cov(w, a) over the refreshes with fresh samples, the rest over all.

    Raises:
        GuardError: shapes that do not fit, a matrix that no score sums have as Gram matrix, or n < k; as
            `gram.checked_probe`.
    """
    probes = [*history, ProbeGram(gram, num_samples, num_correct, prompt_keys)]
    return estimate_pooled(probes, k, threshold=threshold, confidence=confidence, weighting=weighting)


def estimate_pooled(
    probes: Sequence[ProbeGram],
    k: int,
    *,
    threshold: float = 0.0,
    confidence: float = 0.95,
    weighting: Weighting | None = None,
    curve: bool = True,
) -> ConflictEstimate:
    """`estimate_conflict` over a sequence of refreshes, the newest last; `curve=False` leaves out the curve over k.

    Statistics of one refresh alone are kept with its `ProbeGram`, and computed once however often it is pooled.

    Raises:
        GuardError: as `estimate_conflict`, or no refresh at all.
    """
    if not probes:
        raise GuardError("Expected at least one refresh to estimate from; found none.")
    confidence, threshold = as_real(confidence, "confidence"), as_real(threshold, "threshold")
    if not 0 < confidence < 1 or not -1 < threshold < 1:
        raise GuardError(f"Expected 0 < confidence < 1 and -1 < threshold < 1; found {confidence=}, {threshold=}.")
    probes = [checked_probe(probe, k) for probe in probes]
    base = _base(probes, k, threshold, confidence)
    if (reason := _too_little(probes)) is not None:
        return replace(base, reason=reason)
    rows = passk_rows(torch.tensor([k])) if weighting is None else weighting_rows(weighting)
    moments = pooled_moments(probes, rows)
    value, covariance = moments.value[0], moments.covariance[0]
    inner, norm1_sq, normk_sq = value.tolist()
    base = replace(
        base,
        inner_product=inner,
        inner_product_se=float(covariance[0, 0]) ** 0.5,
        degrees=float(moments.degrees[0]),
        mean_weighted_agreement=inner,
        norm1_sq=norm1_sq,
        normk_sq=normk_sq,
    )
    name = f"pass@{k}" if weighting is None else weighting.name
    if min(norm1_sq, normk_sq) > 0:
        base = replace(base, **prompt_view(probes[-1], rows))
        if weighting is None:
            base = replace(base, **weight_and_agreement(probes, k))
    if (reason := no_signal(name, moments)) is not None:
        return replace(base, reason=reason)
    estimate = _with_cosine(base, moments)
    if not curve or weighting is not None or estimate.cosine is None:
        return estimate
    found = _curve(probes, estimate)
    low, high = _k_star_set(found, threshold)
    return replace(estimate, k_star=_k_star(found), k_star_low=low, k_star_high=high, curve=found)


def in_conflict(estimate: ConflictEstimate, confidence: float) -> bool:
    """Whether <grad J_k, grad J_1> < 0 at this one-sided confidence, e.g. 0.8413 for one standard error.

    The inner product is tested, which needs no norms: there is an answer where the cosine is undetermined.
    """
    if estimate.inner_product is None or estimate.inner_product_se is None:
        return False
    quantile = student_t_quantile(confidence, estimate.degrees or max(1, estimate.num_informative - 1))
    return estimate.inner_product + quantile * estimate.inner_product_se < 0


def _base(probes: Sequence[ProbeGram], k: int, threshold: float, confidence: float) -> ConflictEstimate:
    """The fields that every estimate has, with or without an angle."""
    rate1, error1 = _pass_rate(probes[-1], 1)
    ratek, errork = _pass_rate(probes[-1], k)
    return ConflictEstimate(
        k=k,
        status="undetermined",
        reason="",
        confidence=confidence,
        threshold=threshold,
        num_prompts=sum(p.num_samples.numel() for p in probes),
        num_informative=sum(int(informative(p).sum()) for p in probes),
        num_refreshes=len(probes),
        pass_at_1=rate1,
        pass_at_1_se=error1,
        pass_at_k=ratek,
        pass_at_k_se=errork,
    )


def no_signal(name: str, moments: Moments) -> str | None:
    """The reason where one weighting has no angle: a squared norm is not established, or few prompts carry it."""
    for norm, side in (("pass@1", 1), (name, 2)):
        value, error = float(moments.value[0, side]), float(moments.jackknife[0, side, side]) ** 0.5
        if value <= error:
            return (
                f"the probe holds no {norm} signal: the squared norm of its gradient is {value:.2g} ± {error:.2g}; "
                "use more prompts or samples, or pool more refreshes"
            )
        if (carried := float(moments.effective_prompts[0, side - 1])) < FEWEST_EFFECTIVE:
            return (
                f"{carried:.1f} prompts' worth of signal carry the {norm} gradient, and a number takes "
                f"{FEWEST_EFFECTIVE:g}: use more prompts that are solved sometimes, or pool more refreshes"
            )
    return None


def cosine_interval(moments: Moments, confidence: float) -> tuple[float, float] | None:
    """Two-sided interval of the cosine of one weighting; None where no cosine in [-1, 1] is ruled out.

    Each cosine c is tested with the degrees of freedom of its own contrast (`Moments.degrees_at`).
    """

    def quantile(cosines: Tensor) -> Tensor:
        return student_t_quantile((1 + confidence) / 2, moments.degrees_at(cosines[:, None])[:, 0])

    bounds = cosine_bounds(moments.value[0], moments.covariance[0], quantile)
    return None if bounds == (-1.0, 1.0) else bounds


def _with_cosine(base: ConflictEstimate, moments: Moments) -> ConflictEstimate:
    cosine, error = corrected_cosine(moments.value[0], moments.covariance[0])
    interval = cosine_interval(moments, base.confidence)
    if interval is None:
        return replace(base, reason="the probe holds no signal: no cosine in [-1, 1] can be ruled out")
    status, reason = _status(*interval, base.threshold, base.confidence)
    inner, norm1_sq, normk_sq = moments.naive[0].tolist()
    return replace(
        base,
        status=status,
        reason=reason,
        cosine=cosine,
        standard_error=error,
        ci_low=interval[0],
        ci_high=interval[1],
        naive_cosine=inner / math.sqrt(norm1_sq * normk_sq) if norm1_sq > 0 and normk_sq > 0 else None,
    )


def _status(low: float, high: float, threshold: float, confidence: float) -> tuple[Status, str]:
    found = f"the {100 * confidence:g}% interval [{low:+.2f}, {high:+.2f}]"
    if high < threshold:
        return "conflict", f"{found} is below the threshold {threshold:g}"
    if low > threshold:
        return "clear", f"{found} is above the threshold {threshold:g}"
    return "undetermined", f"{found} holds the threshold {threshold:g}: the probe cannot tell"


def _curve(probes: Sequence[ProbeGram], base: ConflictEstimate) -> ConflictCurve:
    """The same angle for every k that the samples allow, and the band for all of them together."""
    ks = torch.arange(1, min(int(p.num_samples.min()) for p in probes) + 1)
    moments = pooled_moments(probes, passk_rows(ks))
    numbers = torch.full((3, len(ks)), math.nan, dtype=torch.float64)
    band = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).repeat(1, len(ks))
    established = torch.zeros(len(ks), dtype=torch.bool)
    known = [i for i in range(len(ks)) if no_signal("", moments.at(i)) is None]
    for i in known:
        numbers[0, i] = corrected_cosine(moments.value[i], moments.covariance[i])[0]
    centre = numbers[0].nan_to_num()
    each = level_of_each(moments.changes_at(centre)[:, [i for i in known if i > 0]], base.confidence)  # k = 1 has none
    for i in known:
        one = moments.at(i)
        band[:, i] = torch.tensor(cosine_interval(one, each) or (-1.0, 1.0))
        if (interval := cosine_interval(one, base.confidence)) is None:
            numbers[:, i] = math.nan
        else:
            numbers[1:, i] = torch.tensor(interval, dtype=torch.float64)
            established[i] = interval[1] < base.threshold
    return ConflictCurve(ks, numbers[0], numbers[1], numbers[2], established, band[0], band[1])


def _k_star(curve: ConflictCurve) -> int:
    """The largest k such that no conflict is established at it or below it."""
    first = curve.established.int().argmax() if bool(curve.established.any()) else len(curve.k)
    return int(curve.k[int(first) - 1])


def _k_star_set(curve: ConflictCurve, threshold: float) -> tuple[int, int]:
    """Where the band holds, the largest k up to which there is no conflict is one of these, ends included."""
    clear = int((curve.band_low[1:] >= threshold).int().cumprod(0).sum())
    below = curve.band_high < threshold
    return 1 + clear, int(below.int().argmax()) if bool(below.any()) else len(curve.k)


def _pass_rate(probe: ProbeGram, k: int) -> tuple[float | None, float | None]:
    if probe.reused:  # counts of an earlier policy
        return None, None
    values = pass_at_k(probe.num_samples, probe.num_correct, k)
    error = float(error_parts(values, clusters(probe)).square().sum().sqrt())
    return float(values.mean()), error if len(cluster_sizes(probe)) > 1 else None


def _too_little(probes: list[ProbeGram]) -> str | None:
    """The reason where there are too few clusters of prompts, or too few with a gradient."""
    smallest = min(p.num_samples.numel() for p in probes)
    if smallest < _FEWEST_PROMPTS:
        return f"only {smallest} prompts had enough scored samples; at least {_FEWEST_PROMPTS} are needed"
    if (apart := min(len(cluster_sizes(p)) for p in probes)) < _FEWEST_PROMPTS:
        return f"the prompts are of {apart} clusters; at least {_FEWEST_PROMPTS} are needed, since they are compared"
    if sum(informative_clusters(p) for p in probes) >= _FEWEST_PROMPTS:
        return None
    solved = sum(int((p.num_correct == p.num_samples).sum()) for p in probes)
    failed = sum(int((p.num_correct == 0).sum()) for p in probes)
    total = sum(p.num_samples.numel() for p in probes)
    mixed = total - solved - failed
    return (
        f"of {total} prompts {solved} were always solved and {failed} never, which leaves {mixed} with a gradient; "
        "choose prompts the model solves sometimes"
    )
