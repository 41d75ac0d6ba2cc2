r"""Evidence over a whole run of checks, valid at every one of them. Needs torch alone.

A check gives a value x whose mean is at most 0 where there is nothing to find, and an estimate v of its variance. Two
kinds of checks use this: the angle (x = minus an unbiased estimate of <grad J_k, grad J_1>) and the realised change of
pass@1 (x = minus an unbiased estimate of it). With S and V the sums of x and of v over the checks j to t,
$e^{\lambda S - \lambda^2 V/2}$ has a mean of at most 1 for normal sums, for any $\lambda \ge 0$ and any first check j.
Mixed over a half-normal prior on $\lambda$ (Robbins 1970, *Statistical methods related to the law of the iterated
logarithm*) and over the first check, with weights $1/(j(j+1))$ that add up to 1, it exceeds $1/\alpha$ at *some* check
of an endless run with a probability of at most $\alpha$ (Ville 1939; Ramdas et al. 2023, arXiv 2210.01948, Sec. 3).

The values are added, not the values over their own standard errors: v is small just where a sample misses the few
prompts that carry the mean, so that the mean of x/sqrt(v) is not 0, and a sum of them grows with every check. V is
estimated, so the bound is a calibrated one (benchmarks/README.md, Calibration), not free of assumptions.

Prompts that are asked again are no new evidence about other prompts: from the check on at which they recur, V counts
what they bring to every variance (`estimation.recurrence`) once for each pair of checks that share them. The evidence
then ends where these prompts would be known exactly.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from passk_guard.estimation.agreement import informative_clusters
from passk_guard.estimation.gram import checked_probe
from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.recurrence import prompt_variance
from passk_guard.estimation.ustatistics import passk_rows, refresh_moments
from passk_guard.utils.arguments import as_real
from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import brief

LARGEST = 2.5
"""A value counts as at most this many standard errors, so that no check alone is enough."""

DOUBT = 2.0
"""Standard errors of the mean variance that are added to it."""

RECENT = 8
"""Checks whose mean variance sets the weight of the next: gradients grow and shrink along a run."""

_FEWEST_CHECKS = 4  # from here on the values' own scatter counts
_FEWEST_PROMPTS = 3
_FARTHEST = 1000.0  # standard errors below 0: the squares of far lower values would leave only rounding
_STEEPEST = 1e-12  # a variance that grows faster than this between checks is taken to grow so fast


@dataclass(frozen=True)
class Check:
    """What one check says.

    Attributes:
        value: of mean at most 0 where there is nothing to find, large where there is.
        variance: estimate of its variance, >= 0.
        count: degrees of freedom of that estimate, >= 1: at most m - 1 for m prompts, fewer where few of them carry
            it (`Moments.degrees_at`; for a mean, Kish's (sum a)^2 / sum a^2 over the squared deviations a is safe).
        share: of the probe set that a check asks, in [0, 1]; 0 where prompts never recur.
        prompt_variance: >= 0, the part of `variance` that the prompts bring, whatever their samples.

    Raises:
        GuardError: anything but finite numbers in these ranges.
    """

    value: float
    variance: float
    count: float
    share: float = 0.0
    prompt_variance: float = 0.0

    def __post_init__(self) -> None:
        for name in vars(self):
            object.__setattr__(self, name, as_real(getattr(self, name), name))
        if not all(map(math.isfinite, vars(self).values())) or self.variance < 0 or self.count < 1:
            raise GuardError(
                "Expected a finite `value`, `variance` >= 0 and `count` >= 1 of a check; found "
                f"{self.value}, {self.variance} and {self.count}."
            )
        if not 0 <= self.share <= 1 or self.prompt_variance < 0:
            raise GuardError(
                "Expected a `share` in [0, 1] and a `prompt_variance` >= 0 of a check; found "
                f"{self.share} and {self.prompt_variance}."
            )


@dataclass(frozen=True)
class RunEvidence:
    """What the checks so far say together; immutable, and plain enough for a checkpoint.

    Attributes:
        checks: since the beginning, or since the last alarm ended, oldest first.
        before: checks before those, whose share of the allowed error is spent.
    """

    checks: tuple[Check, ...] = ()
    before: int = 0

    def with_check(self, check: Check | None) -> RunEvidence:
        """One check more; None, or one of variance 0, says nothing and changes nothing."""
        if check is None or check.variance == 0:
            return self
        return RunEvidence((*self.checks, check), self.before)

    def restarted(self) -> RunEvidence:
        """Forget the checks, not how many there were: another alarm needs evidence of its own."""
        return RunEvidence((), self.before + len(self.checks))

    @property
    def p_value(self) -> float:
        """Anytime-valid p-value of "nothing to find", in [0, 1]: ever below alpha with a probability of <= alpha."""
        if not self.checks:
            return 1.0
        rows = [(check.value, check.variance, check.count, check.prompt_variance) for check in self.checks]
        values, variances, counts, prompts = torch.tensor(rows, dtype=torch.float64).T
        share = self.checks[-1].share
        return math.exp(-max(0.0, float(log_evidence(values, variances, counts, self.before, share, prompts))))


def log_evidence(
    values: Tensor,
    variances: Tensor,
    counts: Tensor,
    before: int = 0,
    share: float = 0.0,
    prompt_variances: Tensor | None = None,
) -> Tensor:
    r"""[...] log of the mixture over strengths and first checks, after the last of t >= 1 checks.

    Each check is weighed by one over the root of the mean variance of up to `RECENT` checks *before* it, which leaves
    its mean at most 0 and fixes the scale of the prior; the first is weighed by its own. V of the checks j to t is the
    larger of two: the sum of their variances, and their number times the pooled variance of all t checks. The pooled
    one is their mean plus `DOUBT` times its standard error, $\sqrt{\sum_i (v_i - \bar v)^2 + 2 v_i^2/d_i}/t$ with d_i
    the degrees of freedom, or half the mean squared difference of successive values where that is larger, as it is
    where prompts come in clusters.

    Where checks ask a share s of a probe set, two of them have that share of their prompts in common once the set is
    used up. V of n checks then has n(n - 1)s times the mean prompt variance more. What is not known of that mean is
    what so many prompts leave open, and not so many checks. A value of prompts that were asked r times in the mean
    counts up to $\sqrt r$ times `LARGEST`.

    Args:
        values, variances, counts: [..., t] float64 of `Check`, for any number of runs, oldest first; variances > 0.
        before: checks before those.
        share: of the probe set that a check asks; 0 where prompts never recur.
        prompt_variances: [..., t] of `Check`; the variances themselves by default.
    """
    t = values.shape[-1]
    number = torch.arange(1, t + 1, dtype=torch.float64)
    earlier = torch.nn.functional.pad(variances[..., :-1], (RECENT, 0)).unfold(-1, RECENT, 1).sum(-1)
    usual = torch.cat([variances[..., :1], earlier[..., 1:] / number[:-1].clamp(max=RECENT)], -1)
    v = variances / torch.maximum(usual, _STEEPEST * variances)
    x = (values / variances.sqrt()).clamp(min=-_FARTHEST, max=_FARTHEST) * v.sqrt()
    mean = v.mean(-1, keepdim=True)
    doubt = ((v - mean).square() + 2 * v.square() / counts).sum(-1, keepdim=True).sqrt() / t
    pooled = mean + DOUBT * doubt
    if t >= _FEWEST_CHECKS:
        pooled = torch.maximum(pooled, x.diff().square().mean(-1, keepdim=True) / 2)
    rounds = max(1.0, (before + t) * share)
    x = torch.minimum(x, LARGEST * math.sqrt(rounds) * torch.maximum(v, pooled).sqrt())
    spread = torch.maximum(v.flip(-1).cumsum(-1), number * pooled)
    if rounds > 1 + 1e-9:
        shared = v if prompt_variances is None else prompt_variances * (v / variances)
        known = (shared.mean(-1, keepdim=True) / mean).clamp(max=1)
        spread = spread + number * (number - 1) * share * known * (mean + DOUBT * math.sqrt(rounds) * doubt)
    began = before + number.flip(-1)
    return torch.logsumexp(_log_mixture(x.flip(-1).cumsum(-1), spread) - (began * (began + 1)).log(), -1)


def _log_mixture(sums: Tensor, variances: Tensor) -> Tensor:
    r"""Log of $\int e^{\lambda S - \lambda^2 V/2}$ over a half-normal prior of scale 1, each."""
    precision = variances + 1
    z = (sums / precision.sqrt()).clamp(min=-_FARTHEST)
    return math.log(2) - precision.log() / 2 + z.square() / 2 + torch.special.log_ndtr(z)


def conflict_check(probe: ProbeGram, k: int, *, threshold: float = 0.0, share: float = 0.0) -> Check | None:
    """How far this refresh alone speaks for cos(grad J_k, grad J_1) < threshold.

    The value is threshold sqrt(U_11 U_kk) - U_k1: unbiased at a threshold of 0. Its variance is that of
    `intervals.cosine_bounds`.

    Args:
        probe: one refresh, checked, with at least k samples of each prompt.
        share: of the probe set that these prompts are; 0 where they never recur.

    Returns:
        None where there is no statistic: fewer than 3 clusters of prompts with a gradient, or, for a threshold other
        than 0, a squared norm that is not positive. None for samples of an earlier refresh too: given what was seen of
        them then, their value has another mean.
    """
    if probe.reused or informative_clusters(probe) < _FEWEST_PROMPTS:
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
    variance = max(0.0, float(slope @ covariance @ slope))
    if variance == 0:
        return None
    count = float(moments.degrees_at(torch.tensor([threshold], dtype=torch.float64))[0])
    value = threshold * length - inner
    found = prompt_variance(probe, k, slope, -value) if share else 0.0
    return Check(value, variance, count, share, variance if found is None else max(0.0, found))


def run_p_value(probes: Sequence[ProbeGram], k: int, *, threshold: float = 0.0) -> list[float]:
    """The p-value of "no conflict so far" after each of these refreshes, valid at all of them together.

    The chance that it is ever at most alpha in a run without a conflict is at most alpha, as calibrated
    (docs/guarantees.md): the rule behind the verdict CONFLICT.

    A prompt that recurs is known by its `prompt_keys`, and its second sample counts for what it adds to the first.

    Args:
        probes: of a run, oldest first, each with samples drawn for it; others add nothing.
        k: of pass@k.
        threshold: cosines below it are a conflict, in (-1, 1).

    Raises:
        GuardError: no list of probes, fewer than k samples of a prompt, or a threshold outside (-1, 1).
    """
    if not -1 < as_real(threshold, "threshold") < 1:
        raise GuardError(f"Expected -1 < `threshold` < 1; found {threshold}.")
    if isinstance(probes, ProbeGram) or not all(isinstance(probe, ProbeGram) for probe in probes):
        raise GuardError(f"Expected `probes` to be a list of ProbeGram, one a refresh; found {brief(probes)}.")
    probes = [checked_probe(probe, k) for probe in probes]
    shares = _shares(probes)
    evidence, found = RunEvidence(), []
    for probe, share in zip(probes, shares, strict=True):
        check = conflict_check(probe, k, threshold=threshold, share=shares[-1])
        evidence = evidence.with_check(None if check is None else replace(check, share=share))
        found.append(evidence.p_value)
    return found


def _shares(probes: Sequence[ProbeGram]) -> list[float]:
    """Prompts of a check over the different ones so far, after each refresh; 0 while none has recurred."""
    seen, asked, shares = set[Hashable](), 0, []
    for number, probe in enumerate(probes, start=1):
        m = probe.num_samples.numel()
        asked += m
        seen.update(probe.prompt_keys if len(probe.prompt_keys) else ((number, x) for x in range(m)))
        shares.append(asked / number / len(seen) if len(seen) < asked else 0.0)
    return shares
