"""Estimates with their uncertainty: means, Wilson's interval, and the jackknife over prompts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from passk_guard.analysis.record import Number
from passk_guard.estimation.intervals import student_t_quantile


def normal_quantile(confidence: float) -> float:
    """Of the two-sided interval."""
    return float(torch.special.ndtri(torch.tensor((1 + confidence) / 2, dtype=torch.float64)))


def mean(values: Tensor, confidence: float, *, low: float = -math.inf, high: float = math.inf) -> Number:
    """Mean of independent values [m] with its standard error and Student's interval, cut to [low, high].

    Where all values are equal, as for prompts that are all solved every time, no spread is seen and no interval given.
    """
    m, value = values.numel(), float(values.double().mean())
    if m < 2 or not (error := float(values.double().std()) / math.sqrt(m)) > 0:
        return Number(value)
    room = student_t_quantile((1 + confidence) / 2, m - 1) * error
    return Number(value, error, max(low, value - room), min(high, value + room))


def wilson(correct: int, samples: int, confidence: float) -> Number:
    """c/n with Wilson's interval (1927), which stays inside [0, 1] and opens at c = 0 and c = n."""
    z, p = normal_quantile(confidence), correct / samples
    centre = (p + z * z / (2 * samples)) / (1 + z * z / samples)
    room = z / (1 + z * z / samples) * math.sqrt(p * (1 - p) / samples + z * z / (4 * samples**2))
    low = 0.0 if correct == 0 else max(0.0, centre - room)
    high = 1.0 if correct == samples else min(1.0, centre + room)
    return Number(p, math.sqrt(p * (1 - p) / samples), low, high)


def with_error(value: float, error: float, quantile: float) -> Number:
    """value, and the interval of so many standard errors on both sides."""
    return Number(value, error, value - quantile * error, value + quantile * error)


def jackknife_error(without: Tensor) -> float:
    """Standard error from the leave-one-out values [m] of a statistic: sqrt((m-1)/m sum of squared deviations)."""
    m = without.numel()
    return float(((m - 1) / m * (without - without.mean()).square().sum()).sqrt())


def image(function: Callable[[float], float], number: Number) -> Number:
    """The value of a function of a number, and the range it takes on the number's interval (looked at in 200 steps)."""
    if number.value is None or number.low is None or number.high is None:
        return Number()
    inside = torch.linspace(number.low, number.high, 201, dtype=torch.float64).tolist()
    reached = [function(x) for x in (number.value, *inside)]
    return Number(function(number.value), None, min(reached), max(reached))
