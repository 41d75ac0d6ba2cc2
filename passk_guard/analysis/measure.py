"""From the Gram matrix to the records of the whole probe and of each prompt, and what each mitigation would do.

The predictions take grad J_k for the training gradient and grad J_1 for the protected direction, both as the probe
estimates them. A training batch adds noise. What is kept of the gain is cos(mitigated gradient, grad J_k): the share of
the first-order gain in J_k that a step of the same length has left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from passk_guard.analysis.estimates import (
    angle,
    gradient_row,
    image,
    jackknife_error,
    mean,
    other_rows,
    wilson,
    with_error,
)
from passk_guard.analysis.results import AtK, Curve, Kernel, Number, Prediction, Prompt
from passk_guard.analysis.settings import Settings
from passk_guard.estimation.agreement import informative
from passk_guard.estimation.estimate import estimate_pooled
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.estimation.records import ConflictEstimate, ProbeGram
from passk_guard.estimation.ustatistics import clusters, prompt_kernel
from passk_guard.mitigation.floor import solve_floor
from passk_guard.mitigation.projection import plan_projection
from passk_guard.passk.closed_forms import pass_at_k, passk_weight, sample_coefficients, unbiased_passk_weight
from passk_guard.utils.clusters import cluster_sums, numbered

_HURT = 3  # prompts named of those that one prompt hurts


def estimate_each(probe: ProbeGram, settings: Settings) -> dict[int, ConflictEstimate]:
    """The estimate at every k above 1, by rising k. The largest k with a cosine holds the curve over k."""
    estimates: dict[int, ConflictEstimate] = {}
    curve = True  # the same from every k: computed once
    for k in reversed([k for k in settings.ks if k > 1]):
        estimates[k] = estimate_pooled(
            [probe], k, threshold=settings.threshold, confidence=settings.confidence, curve=curve
        )
        curve = curve and estimates[k].curve is None
    return dict(reversed(estimates.items()))


def measure_at(probe: ProbeGram, k: int, estimate: ConflictEstimate | None, confidence: float) -> AtK:
    """Pass rate, mean weight and conflict at one k. `estimate` is None at k = 1."""
    n, c = probe.num_samples, probe.num_correct
    cluster = clusters(probe)
    rate = mean(pass_at_k(n, c, k), confidence, cluster, low=0.0, high=1.0)
    if estimate is None:
        return AtK(k, rate, Number(1.0), Number(), Number(), None, "grad J_1 against itself")
    return AtK(
        k=k,
        pass_rate=rate,
        mean_weight=mean(unbiased_passk_weight(n, c, k), confidence, cluster, low=0.0),
        cosine=cosine_of(estimate),
        inner_product=inner_product_of(estimate),
        status=estimate.status,
        reason=estimate.reason,
    )


def cosine_of(estimate: ConflictEstimate) -> Number:
    """cos(grad J_k, grad J_1) with its interval; without a value where the probe does not determine it."""
    return Number(estimate.cosine, estimate.standard_error, estimate.ci_low, estimate.ci_high)


def inner_product_of(estimate: ConflictEstimate) -> Number:
    """<grad J_k, grad J_1> with its interval."""
    if estimate.inner_product is None or estimate.inner_product_se is None:
        return Number()
    quantile = student_t_quantile(
        (1 + estimate.confidence) / 2, estimate.degrees or max(1, estimate.num_informative - 1)
    )
    return with_error(estimate.inner_product, estimate.inner_product_se, quantile)


def curve_of(estimates: dict[int, ConflictEstimate]) -> Curve | None:
    """The curve over k; None where no estimate is determined."""
    for estimate in estimates.values():
        if (curve := estimate.curve) is not None and estimate.k_star is not None:
            cosine, low, high = (_numbers(values) for values in (curve.cosine, curve.ci_low, curve.ci_high))
            band = curve.band_low.tolist(), curve.band_high.tolist(), estimate.k_star_low, estimate.k_star_high
            return Curve(curve.k.tolist(), cosine, low, high, curve.established.tolist(), estimate.k_star, *band)
    return None


def kernel_from(probe: ProbeGram, names: list[int]) -> Kernel:
    """The kernel of the prompts with a gradient, from easy to hard.

    Args:
        probe: m prompts.
        names: [m] their places.
    """
    one = gradient_row(probe, 1)
    rate = probe.num_correct.double() / probe.num_samples
    rows = informative(probe).nonzero().flatten()
    rows = rows[rate[rows].argsort(descending=True, stable=True)]
    kernel = prompt_kernel(probe, one, one)[rows][:, rows]
    below = [[_short(v) for v in row[:i]] for i, row in enumerate(kernel.tolist())]
    return Kernel([names[i] for i in rows.tolist()], below, _negative_pairs(kernel, clusters(probe)[rows]))


def _negative_pairs(kernel: Tensor, cluster: Tensor) -> Number:
    """Share of negative pairs of clusters that differ, with the jackknife over clusters; none below three of them."""
    cluster = numbered(cluster.tolist())
    if not cluster.numel() or int(cluster.max()) < 2:
        return Number()
    pairs = (cluster[:, None] != cluster).double()
    negative = pairs * (kernel < 0)

    def left(table: Tensor) -> Tensor:
        return table.sum() - 2 * cluster_sums(table.sum(1), cluster)  # no pair is within a cluster

    share = float(negative.sum() / pairs.sum())
    return Number(share, jackknife_error(left(negative) / left(pairs)))


def prompt_records(
    probe: ProbeGram, k: int, names: Sequence[int], texts: Sequence[str], confidence: float
) -> list[Prompt]:
    r"""One record for each prompt.

    $a(x) = \frac{1}{m-1} \sum_{x' \ne x} \langle g_1(x), g_1(x') \rangle$, and the weighted agreement is the same
    with g_k(x) on the left. Their standard errors are over the other prompts x'. Prompts of one cluster are no pair.

    Args:
        probe: m prompts.
        k: of the weights.
        names: [m] places of the prompts.
        texts: [m] their texts.
        confidence: of the intervals.
    """
    one = gradient_row(probe, 1)
    cluster = clusters(probe)
    agreement, agreement_error = other_rows(prompt_kernel(probe, one, one), cluster)
    crossed = prompt_kernel(probe, gradient_row(probe, k), one)
    weighted, weighted_error = other_rows(crossed, cluster)
    against = float(-weighted.clamp(max=0).sum())
    weights = unbiased_passk_weight(probe.num_samples, probe.num_correct, k).tolist()
    known = informative(probe).tolist()

    def number(values: Tensor, errors: Tensor, i: int) -> Number:
        return Number(float(values[i]), float(errors[i])) if known[i] else Number()

    records = []
    for i, place in enumerate(names):
        n, c = int(probe.num_samples[i]), int(probe.num_correct[i])
        rate = wilson(c, n, confidence)
        records.append(
            Prompt(
                place=place,
                text=texts[i],
                num_samples=n,
                num_correct=c,
                pass_rate=rate,
                weight=weight_of(weights[i], rate, k),
                agreement=number(agreement, agreement_error, i),
                weighted_agreement=number(weighted, weighted_error, i),
                share=_share(float(weighted[i]), float(weighted_error[i]), against) if known[i] else Number(0.0),
                hurts=_hurt(crossed[i], i, names) if known[i] else [],
            )
        )
    return records


def weight_of(value: float, rate: Number, k: int) -> Number:
    """w_k falls with p from k = 2 on, so the ends of p's interval give those of the weight's."""
    low, high = (float(passk_weight(torch.tensor(p, dtype=torch.float64), k)) for p in (rate.high, rate.low))
    return Number(value, None, min(low, value), max(high, value))


def _share(weighted: float, error: float, against: float) -> Number:
    return Number(-weighted / against, error / against) if weighted < 0 < against else Number(0.0)


def _hurt(row: Tensor, own: int, names: Sequence[int]) -> list[tuple[int, float]]:
    worst = [i for i in row.argsort(stable=True)[: _HURT + 1].tolist() if i != own and row[i] < 0]
    return [(names[i], float(row[i])) for i in worst[:_HURT]]


def _numbers(values: Tensor) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def predictions(probe: ProbeGram, estimates: Mapping[int, ConflictEstimate], settings: Settings) -> list[Prediction]:
    """One entry for each mitigation, at the largest k. The list is empty when only k = 1 was asked for.

    Args:
        probe: Gram matrix and counts.
        estimates: by k.
        settings: `gamma`, `floor_gamma` and `confidence`.
    """
    estimate = estimates.get(settings.k)
    if estimate is None:
        return []
    return [projected(estimate, settings.gamma), floored(probe, settings)]


def projected(estimate: ConflictEstimate, gamma: float) -> Prediction:
    """`project`: g_k <- g_k + c grad J_1 as in `mitigation.project`.

    With s = cos(g_k, grad J_1) < gamma: the cosine after is gamma / sqrt(1 + gamma^2 - s^2), and
    cos(g', g_k) = (1 + (gamma - s) s) / sqrt(1 + gamma^2 - s^2). Their intervals are what they reach on that of s.
    """
    cosine, setting = cosine_of(estimate), f"gamma = {gamma:g}"
    if cosine.value is None:
        return Prediction("project", setting, Number(), Number(), f"undetermined: {estimate.reason}")
    note = f"projects the gradient wherever its cosine is below {gamma:g}"
    if cosine.low is not None and cosine.low >= gamma:
        note = f"nothing to do: the whole interval of the cosine is above {gamma:g}"
    after = image(lambda s: _cosine_after(s, gamma), cosine)
    return Prediction("project", setting, after, image(lambda s: _kept(s, gamma), cosine), note)


def floored(probe: ProbeGram, settings: Settings) -> Prediction:
    """`reweight`: no prompt weighs less than the smallest floor at which the cosine reaches gamma.

    The cosine given is that of the floored gradient, measured on the samples that the floor was solved from.
    """
    k, gamma = settings.k, settings.floor_gamma
    solution = solve_floor([probe], k, gamma=gamma)
    if solution.floor is None:
        note = f"{solution.status.replace('_', ' ')}: {solution.reason}{_bound(probe)}"
        return Prediction("floor", f"for a cosine of {gamma:g}", Number(), Number(), note)
    floor = torch.cat(sample_coefficients(probe.num_samples, probe.num_correct, k, floor=solution.floor))
    cosine = angle(probe, floor, gradient_row(probe, 1), settings.confidence)
    kept = angle(probe, floor, gradient_row(probe, k), settings.confidence)
    error = "" if solution.standard_error is None else f" ± {solution.standard_error:.2f}"
    solved = f"the smallest floor for a cosine of {gamma:g}"
    note = "no floor is needed" if solution.status == "not_needed" else solved
    if cosine.value is None:
        note += ", but the floored gradient is too small against its noise for an interval"
    return Prediction("floor", f"floor = {solution.floor:.2f}{error}", cosine, kept, f"{note}{_bound(probe)}")


def harmless_ratio(probe: ProbeGram) -> Number:
    """A+ / A- with its jackknife error: weights of which none is more than this many times another cannot conflict.

    A+ = E[max(a, 0)] and A- = E[max(-a, 0)] (arXiv 2602.21189, Sec. 4). Noise in the agreement scores pulls it towards
    1, to the safe side. Nothing where no prompt disagrees, or none of the rest once one is left out.
    """
    one = gradient_row(probe, 1)
    cluster = clusters(probe)
    own = cluster[:, None] == torch.arange(int(cluster.max()) + 1)
    kernel = cluster_sums(prompt_kernel(probe, one, one), cluster, 1).masked_fill(own, 0.0).T
    rows = kernel.sum(0)
    without = (rows - kernel).masked_fill(own.T, 0.0)  # row j: the agreements when cluster j is left out
    up, down = without.clamp(min=0).sum(1), -without.clamp(max=0).sum(1)
    if not bool((down > 0).all()) or not bool((rows < 0).any()):
        return Number()
    return Number(float(rows.clamp(min=0).sum() / -rows.clamp(max=0).sum()), jackknife_error(up / down))


def _bound(probe: ProbeGram) -> str:
    ratio = harmless_ratio(probe)
    if ratio.value is None or ratio.value <= 1:
        return ""
    value, error = (float(f"{x:.{digits}g}") for x, digits in ((ratio.value, 2), (ratio.standard_error or 0.0, 1)))
    return f"; theory: weights within A+/A- = {value:g} ± {error:g} cannot conflict"


def _cosine_after(cosine: float, gamma: float) -> float:
    after = plan_projection(cosine, 1.0, 1.0, gamma).cosine_after
    return 0.0 if after is None else after  # gamma = 0 and opposite vectors: the limit from either side


def _kept(cosine: float, gamma: float) -> float:
    if cosine >= gamma:
        return 1.0
    left = 1 + gamma * gamma - cosine * cosine
    return (1 + (gamma - cosine) * cosine) / math.sqrt(left) if left > 0 else 0.0
