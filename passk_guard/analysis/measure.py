"""From the Gram matrix to the records of the whole probe and of each prompt: rates, cosines, k*, the kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from passk_guard.analysis.estimates import gradient_row, jackknife_error, mean, off_diagonal_rows, wilson, with_error
from passk_guard.analysis.results import AtK, Curve, Kernel, Number, Prompt
from passk_guard.analysis.settings import Settings
from passk_guard.estimation.agreement import informative
from passk_guard.estimation.estimate import estimate_pooled
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.estimation.records import ConflictEstimate, ProbeGram
from passk_guard.estimation.ustatistics import prompt_kernel
from passk_guard.passk.closed_forms import pass_at_k, passk_weight, unbiased_passk_weight

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
    rate = mean(pass_at_k(n, c, k), confidence, low=0.0, high=1.0)
    if estimate is None:
        return AtK(k, rate, Number(1.0), Number(), Number(), None, "grad J_1 against itself")
    return AtK(
        k=k,
        pass_rate=rate,
        mean_weight=mean(unbiased_passk_weight(n, c, k), confidence, low=0.0),
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
            return Curve(curve.k.tolist(), cosine, low, high, curve.established.tolist(), estimate.k_star)
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
    return Kernel([names[i] for i in rows.tolist()], below, _negative_pairs(kernel))


def _negative_pairs(kernel: Tensor) -> Number:
    """Share of negative entries off the diagonal, with the jackknife over prompts; none below three prompts."""
    m = kernel.shape[0]
    if m < 3:
        return Number()
    negative = (kernel < 0).double() - torch.diag((kernel.diagonal() < 0).double())
    without = (negative.sum() - 2 * negative.sum(1)) / ((m - 1) * (m - 2))
    return Number(float(negative.sum()) / (m * (m - 1)), jackknife_error(without))


def prompt_records(
    probe: ProbeGram, k: int, names: Sequence[int], texts: Sequence[str], confidence: float
) -> list[Prompt]:
    r"""One record for each prompt.

    $a(x) = \frac{1}{m-1} \sum_{x' \ne x} \langle g_1(x), g_1(x') \rangle$, and the weighted agreement is the same
    with g_k(x) on the left. Their standard errors are over the other prompts x'.

    Args:
        probe: m prompts.
        k: of the weights.
        names: [m] places of the prompts.
        texts: [m] their texts.
        confidence: of the intervals.
    """
    one = gradient_row(probe, 1)
    agreement, agreement_error = off_diagonal_rows(prompt_kernel(probe, one, one))
    crossed = prompt_kernel(probe, gradient_row(probe, k), one)
    weighted, weighted_error = off_diagonal_rows(crossed)
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
                weight=_weight(weights[i], rate, k),
                agreement=number(agreement, agreement_error, i),
                weighted_agreement=number(weighted, weighted_error, i),
                share=_share(float(weighted[i]), float(weighted_error[i]), against) if known[i] else Number(0.0),
                hurts=_hurt(crossed[i], i, names) if known[i] else [],
            )
        )
    return records


def _weight(value: float, rate: Number, k: int) -> Number:
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
