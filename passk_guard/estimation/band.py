r"""A band for many statistics at once, from prompts that are paired: the sup-t band by a multiplier bootstrap.

Differences or cosines at several k come from the same samples and are strongly correlated. A band that holds at all of
them with the stated confidence takes one critical value c for all: the quantile of $\max_k |t^*_k|$, where $t^*$ is
Student's statistic of the residuals multiplied by random signs, one sign a prompt (Chernozhukov, Chetverikov & Kato
2013, arXiv 1212.6906, for the multipliers; Montiel Olea & Plagborg-Moller 2019, *Simultaneous confidence bands*, for
sup-t). Needs torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.utils.arguments import as_real
from passk_guard.utils.errors import GuardError

_FEWEST_PROMPTS = 3
_AT_ONCE = 1 << 22  # multipliers held at a time


@dataclass(frozen=True)
class Band:
    """K means with an interval for each, all of which hold together at the stated confidence.

    Attributes:
        mean, standard_error: [K] over prompts, float64.
        low, high: [K] of the band, in [-1, 1].
        critical: standard errors on each side of a mean; at least Student's quantile for one interval.
    """

    mean: Tensor
    standard_error: Tensor
    low: Tensor
    high: Tensor
    critical: float


def simultaneous_band(
    per_prompt_differences: Tensor, confidence: float = 0.95, draws: int = 4000, seed: int = 0
) -> Band:
    """A band that covers the K expected differences together.

    A column whose m values are all equal has no spread to make an interval of. Its interval is that of
    `unseen_share`, at both ends of which the prompts not seen differ as far as they can.

    Args:
        per_prompt_differences: [m, K] differences of two rates, in [-1, 1]; rows are independent prompts.
        confidence: that all K intervals hold, in (0, 1).
        draws: bootstrap draws.
        seed: of their signs. The same arguments give the same band.

    Raises:
        GuardError: another shape, fewer than 3 prompts, a value outside [-1, 1], a confidence outside (0, 1), or no
            draws.
    """
    values = _checked(per_prompt_differences, confidence)
    if values.ndim != 2:
        raise GuardError(f"Expected differences of shape [prompts, K]; found {tuple(values.shape)}.")
    if draws < 1:
        raise GuardError(f"Expected `draws` >= 1; found {draws}.")
    m = len(values)
    mean, error = values.mean(0), values.std(0) / m**0.5
    constant = (values == values[0]).all(0)
    error[constant] = 0.0  # and not what rounding leaves
    critical = _critical(values[:, ~constant], confidence, draws, seed)
    unseen = unseen_share(m, (1 - confidence) / 2)
    low = torch.where(constant, mean - unseen * (1 + mean), mean - critical * error)
    high = torch.where(constant, mean + unseen * (1 - mean), mean + critical * error)
    return Band(mean, error, low.clamp(min=-1), high.clamp(max=1), critical)


def level_of_each(columns: Tensor, confidence: float, draws: int = 4000, seed: int = 0) -> float:
    """The confidence of one interval at which K of them hold together at `confidence`; for statistics with a jackknife.

    Args:
        columns: [N, K] what each of N prompts does to each of K statistics, their jackknife changes.
        confidence: that all K intervals hold, in (0, 1). It is returned where no column has any spread.
        draws, seed: as in `simultaneous_band`.
    """
    spread = columns.std(0)
    used = columns[:, spread > 1e-12 * spread.max()]
    critical = _critical(used, confidence, draws, seed)
    low, high = confidence, 1 - 1e-9
    for _ in range(50):
        middle = (low + high) / 2
        below = student_t_quantile((1 + middle) / 2, len(columns) - 1) < critical
        low, high = (middle, high) if below else (low, middle)
    return low


def _critical(values: Tensor, confidence: float, draws: int, seed: int) -> float:
    """Standard errors on each side, for values [m, K] none of whose columns is constant."""
    critical = student_t_quantile((1 + confidence) / 2, len(values) - 1)
    if not values.shape[1]:
        return critical
    largest = _largest_scores(values, draws, seed)
    return max(critical, float(torch.quantile(largest, confidence, interpolation="higher")))


def upper_bound(differences: Tensor, confidence: float = 0.95) -> float:
    """One-sided upper bound of the expected difference, by Student's t; where all are equal, by `unseen_share`.

    Args:
        differences: [m] of two rates, in [-1, 1], of independent prompts.
        confidence: that the bound holds, in (0, 1).

    Raises:
        GuardError: as `simultaneous_band`.
    """
    values = _checked(differences, confidence)
    m, mean = len(values), float(values.mean())
    if bool((values == values[0]).all()):
        return mean + unseen_share(m, 1 - confidence) * (1 - mean)
    return min(1.0, mean + student_t_quantile(confidence, m - 1) * float(values.std()) / m**0.5)


def unseen_share(prompts: int, alpha: float) -> float:
    r"""Largest share of other prompts that m of the same kind leave possible: $1 - \alpha^{1/m}$ (Clopper & Pearson).

    Args:
        prompts: m >= 1, all alike.
        alpha: chance that the share is larger, in (0, 1).
    """
    return float(-torch.expm1(torch.tensor(alpha, dtype=torch.float64).log() / prompts))


def _checked(differences: Tensor, confidence: float) -> Tensor:
    if not 0 < as_real(confidence, "confidence") < 1:
        raise GuardError(f"Expected 0 < `confidence` < 1; found {confidence}.")
    if differences.ndim < 1 or len(differences) < _FEWEST_PROMPTS:
        raise GuardError(
            f"Expected differences of at least {_FEWEST_PROMPTS} prompts, over which the error is taken; found "
            f"{len(differences) if differences.ndim else 0}. Pass more prompts."
        )
    values = differences.double().cpu()
    if not bool((values.abs() <= 1).all()):  # nor NaN
        raise GuardError("Expected differences of two pass rates, in [-1, 1]; found a value outside or NaN.")
    return values


def _largest_scores(values: Tensor, draws: int, seed: int) -> Tensor:
    """[draws] largest |t*| over the columns of values [m, K], none of them constant."""
    m = len(values)
    residuals = values - values.mean(0)
    residuals = residuals / residuals.square().sum(0).sqrt()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for first in range(0, draws, size := max(1, _AT_ONCE // m)):
        signs = torch.randint(0, 2, (min(size, draws - first), m), generator=generator, dtype=torch.int8)
        sums = (2 * signs.double() - 1) @ residuals
        # Signs leave the squares as they are: the variance of a draw needs its mean alone.
        spread = ((1 - sums.square() / m).clamp(min=1e-12) / (m - 1)).sqrt()
        found.append((sums.abs() / m / (spread / m**0.5)).amax(1))
    return torch.cat(found)
