r"""Evidence for a conflict over a whole run of looks, valid at every one of them. Needs torch alone.

Each refresh gives a score: the one-sided p-value of "no conflict now", as a standard normal. Under "no conflict at
any look" the scores of refreshes with fresh samples are at most standard normal, so for any $\lambda \ge 0$ and any
first look $j$ the product $\prod_{i=j}^{t} e^{\lambda x_i - \lambda^2/2}$ is a non-negative supermartingale. Mixed over
a half-normal prior on $\lambda$ (Robbins 1970, *Statistical methods related to the law of the iterated logarithm*) and
over the looks a conflict may begin at, with weights $1/(j(j+1))$ that add up to 1, it exceeds $1/\alpha$ at *some* look
of an endless run with a probability of at most $\alpha$ (Ville 1939; Ramdas et al. 2023, arXiv 2210.01948, Sec. 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from passk_guard.estimation.agreement import informative
from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.ustatistics import passk_rows, refresh_moments
from passk_guard.utils.arguments import as_real
from passk_guard.utils.errors import GuardError

LARGEST_SCORE = 3.0
"""Scores are cut here: the calibration vouches for p-values down to 0.001, not for what lies beyond."""

SMALLEST_SCORE = -1000.0
"""And here: no p-value tells lower ones apart, and the squares of far lower ones would leave only rounding."""

HANDICAP = 0.1
"""Taken off every score: in the calibration their mean is up to 0.07 above 0 where there is no conflict, since the
variance of a skewed average goes with its value, and over hundreds of looks that would add up."""

_FEWEST_PROMPTS = 3
_LARGEST_T = 1e100  # its square is finite


@dataclass(frozen=True)
class RunEvidence:
    """What the looks so far say together; immutable, and plain enough for a checkpoint.

    Attributes:
        scores: of the looks since the beginning, or since the last CONFLICT ended, oldest first.
        before: looks before those, whose share of the allowed error is spent.
    """

    scores: tuple[float, ...] = ()
    before: int = 0

    def with_score(self, score: float | None) -> RunEvidence:
        """One look more; None, a look without a score, changes nothing.

        Raises:
            GuardError: the score is NaN, or no number.
        """
        if score is None:
            return self
        score = as_real(score, "score")
        if math.isnan(score):
            raise GuardError("Expected a score, or None for a look without one; found NaN.")
        return RunEvidence((*self.scores, max(SMALLEST_SCORE, min(score, LARGEST_SCORE))), self.before)

    def restarted(self) -> RunEvidence:
        """Forget the scores, not how many there were: another alarm needs evidence of its own."""
        return RunEvidence((), self.before + len(self.scores))

    @property
    def p_value(self) -> float:
        """Anytime-valid p-value of "no conflict at any look", in (0, 1]: ever below alpha with probability <= alpha."""
        return math.exp(-max(0.0, float(log_evidence(torch.tensor(self.scores, dtype=torch.float64), self.before))))


def log_evidence(scores: torch.Tensor, before: int = 0) -> torch.Tensor:
    """[...] log of the mixture over the look a conflict began at, after the last look; -inf before the first.

    Args:
        scores: [..., t] float64 of t looks in each of any number of runs, oldest first, at most `LARGEST_SCORE`.
        before: looks before those.
    """
    looks = scores.shape[-1]
    began = before + torch.arange(looks, 0, -1, dtype=torch.float64)
    return torch.logsumexp(_log_mixture(scores.flip(-1).cumsum(-1)) - (began * (began + 1)).log(), -1)


def _log_mixture(sums: torch.Tensor) -> torch.Tensor:
    r"""Log of $\int e^{\lambda S - n \lambda^2/2}$, half-normal prior of scale 1, for sums [..., t] of 1..t scores."""
    precision = torch.arange(1, sums.shape[-1] + 1, dtype=torch.float64) + 1
    return (
        math.log(2)
        - precision.log() / 2
        + sums.square() / (2 * precision)
        + torch.special.log_ndtr(sums / precision.sqrt())
    )


def conflict_score(probe: ProbeGram, k: int, *, threshold: float = 0.0) -> float | None:
    """How far this refresh alone speaks for cos(grad J_k, grad J_1) < threshold, as a standard normal score.

    The studentised statistic of `intervals.cosine_bounds`, U_k1 - threshold sqrt(U_11 U_kk) over its standard error,
    turned into a normal score of the same p-value (Wallace 1959) and of the other sign, less `HANDICAP`.

    Args:
        probe: one refresh, checked, with at least k samples of each prompt.

    Returns:
        None where there is no statistic: fewer than 3 prompts with a gradient, or, for a threshold other than 0,
        a squared norm that is not positive. None for samples of an earlier refresh too: given what was seen of them
        then, their p-value is not one.
    """
    if probe.reused or int(informative(probe).sum()) < _FEWEST_PROMPTS:
        return None
    moments = refresh_moments(probe, passk_rows(torch.tensor([k])))
    (inner, one, many), covariance = moments.value[0].tolist(), moments.covariance[0]
    slope = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    length = 0.0
    if threshold:
        if min(one, many) <= 0:
            return None
        length = math.sqrt(one * many)
        slope[1:] = -threshold * length / 2 / torch.tensor([one, many], dtype=torch.float64)
    error = math.sqrt(max(0.0, float(slope @ covariance @ slope)))
    if error == 0:
        return None
    return score_of(
        (inner - threshold * length) / error,
        float(moments.degrees_at(torch.tensor([threshold], dtype=torch.float64))[0]),
    )


def score_of(t: float, degrees: float) -> float:
    """The score of a studentised statistic that is small where there is a conflict."""
    return -normal_score(t, degrees) - HANDICAP


def normal_score(t: float, degrees: float) -> float:
    """The standard normal number with the p-value that t has under Student's t (Wallace 1959, Eq. 3).

    Args:
        degrees: of freedom, >= 2. At most 0.06 above the exact score for |t| <= 8, 0.02 from 10 degrees on.
    """
    t = max(-_LARGEST_T, min(t, _LARGEST_T))
    size = math.sqrt(degrees * math.log1p(t * t / degrees)) * (8 * degrees + 1) / (8 * degrees + 3)
    return math.copysign(size, t)
