"""Estimates with their uncertainty: means, Wilson's interval, the jackknife over prompts, and angles."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from passk_guard.analysis.results import Number
from passk_guard.estimation.agreement import informative_clusters
from passk_guard.estimation.estimate import cosine_interval, no_signal
from passk_guard.estimation.intervals import corrected_cosine, student_t_quantile
from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.ustatistics import coefficients, moments_of
from passk_guard.utils.clusters import cluster_sums, error_parts


def gradient_row(probe: ProbeGram, k: int) -> Tensor:
    """[2m] what S+ and S- of each prompt are multiplied with to give the leave-one-out g_k."""
    return coefficients(probe, torch.tensor([k]))[0]


def other_rows(kernel: Tensor, cluster: Tensor) -> tuple[Tensor, Tensor]:
    """[m] mean of each row over the prompts of other clusters, and the standard error of that mean over the clusters.

    Args:
        kernel: [m, m].
        cluster: [m] number of each prompt's cluster, from 0; all different where prompts are independent.
    """
    own = cluster[:, None] == cluster
    others = kernel.masked_fill(own, 0.0)
    count, apart = (~own).sum(1), int(cluster.max())  # clusters beside the own one
    means = others.sum(1) / count
    sums = cluster_sums((others - means[:, None]).masked_fill(own, 0.0), cluster, 1)
    return means, (sums.square().sum(1) * apart / max(apart - 1, 1)).sqrt() / count


def mean(
    values: Tensor, confidence: float, cluster: Tensor, *, low: float = -math.inf, high: float = math.inf
) -> Number:
    """Mean of values [m] with its standard error over clusters [m] and Student's interval, cut to [low, high].

    There is no interval where all values are equal, as for prompts that are all solved every time.
    """
    value, parts = float(values.double().mean()), error_parts(values.double(), cluster)
    if len(parts) < 2 or not bool((values != values[0]).any()) or not (error := float(parts.norm())) > 0:
        return Number(value)
    room = student_t_quantile((1 + confidence) / 2, len(parts) - 1) * error
    return Number(value, error, max(low, value - room), min(high, value + room))


def wilson(correct: int, samples: int, confidence: float) -> Number:
    """c/n with Wilson's interval (1927), which stays inside [0, 1] and opens at c = 0 and c = n."""
    z, p = student_t_quantile((1 + confidence) / 2, math.inf), correct / samples
    centre = (p + z * z / (2 * samples)) / (1 + z * z / samples)
    room = z / (1 + z * z / samples) * math.sqrt(p * (1 - p) / samples + z * z / (4 * samples**2))
    low = 0.0 if correct == 0 else max(0.0, centre - room)
    high = 1.0 if correct == samples else min(1.0, centre + room)
    return Number(p, math.sqrt(p * (1 - p) / samples), low, high)


def with_error(value: float, error: float, quantile: float) -> Number:
    """The value with the interval of `quantile` standard errors on both sides."""
    return Number(value, error, value - quantile * error, value + quantile * error)


def jackknife_error(without: Tensor) -> float:
    """Standard error from the leave-one-out values [m] of a statistic: sqrt((m-1)/m sum of squared deviations)."""
    m = without.numel()
    return float(((m - 1) / m * (without - without.mean()).square().sum()).sqrt())


def image(function: Callable[[float], float], number: Number) -> Number:
    """The value of a function of a number, and its range on the number's interval (evaluated in 200 steps)."""
    if number.value is None or number.low is None or number.high is None:
        return Number()
    inside = torch.linspace(number.low, number.high, 201, dtype=torch.float64).tolist()
    reached = [function(x) for x in (number.value, *inside)]
    return Number(function(number.value), None, min(reached), max(reached))


def angle(probe: ProbeGram, left: Tensor, right: Tensor, confidence: float) -> Number:
    r"""cos(E[g], E[h]) from U-statistics over pairs of different prompts, with its interval.

    $U_{gh} / \sqrt{U_{gg} U_{hh}}$; interval by `estimate.cosine_interval` from the jackknife over prompts.

    Args:
        probe: m prompts.
        left, right: [2m] coefficients of S+ and S- that give g(x) and h(x).
        confidence: of the two-sided interval.

    Returns:
        A `Number` without a value where a squared norm is not established (`estimate.no_signal`), where no cosine can
        be ruled out, or below three clusters with a gradient.
    """
    if informative_clusters(probe) < 3:
        return Number()
    moments = moments_of(probe, left[None], right[None])
    if no_signal("", moments) is not None or (interval := cosine_interval(moments, confidence)) is None:
        return Number()
    return Number(*corrected_cosine(moments.value[0], moments.covariance[0]), *interval)
