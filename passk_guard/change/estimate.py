r"""The realised change: what the updates did to pass@1 and pass@k, from completions drawn before. Needs torch alone.

Completions of held-out prompts, drawn from $\pi_t$ and scored again under $\pi_{t+1}$, say without bias how much
pass@1 and pass@k changed between, for any objective, optimizer and engine. Three conditions: they must not have
steered the updates between, both scores are of the policy that drew them, and the ratios are those of whole sequences
at the sampling temperature. `per_prompt` has the forms, and the controls that take noise off them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from passk_guard.change.per_prompt import adjusted, mean_changes, prompt_changes
from passk_guard.change.samples import Samples, checked_samples
from passk_guard.passk.closed_forms import pass_at_k
from passk_guard.passk.importance import effective_share
from passk_guard.utils.arguments import as_real
from passk_guard.utils.clusters import error_parts, numbered
from passk_guard.utils.errors import GuardError

_FEWEST_PROMPTS = 3
_FEWEST_DEGREES = 3.0


@dataclass(frozen=True)
class GroupChange:
    """The change of some of the prompts. Errors are NaN for a single prompt; pass@k is NaN where none has k samples.

    Attributes:
        num_prompts: how many. pass_at_1, pass_at_k: their mean changes. pass_at_1_se, pass_at_k_se: standard errors.
    """

    num_prompts: int
    pass_at_1: float
    pass_at_1_se: float
    pass_at_k: float
    pass_at_k_se: float


@dataclass(frozen=True)
class LevelEstimate:
    """pass@1 and pass@k of the policy that drew the samples, as means over prompts.

    Attributes:
        level_1, level_k: unbiased. level_1_se, level_k_se: standard errors over prompts.
        num_prompts, num_prompts_k: prompts, and those with k samples or more.
    """

    level_1: float
    level_1_se: float
    level_k: float
    level_k_se: float
    num_prompts: int
    num_prompts_k: int


@dataclass(frozen=True)
class ChangeEstimate:
    """Change of pass@1 and pass@k over one window of updates, as means over prompts.

    Attributes:
        k: the k of pass@k.
        pass_at_1, pass_at_k: changes, unbiased. pass_at_1_se, pass_at_k_se: standard errors over prompts, or over
            their clusters; infinite where a change leaves the range of float64.
        degrees, degrees_k: degrees of freedom of the two standard errors.
        effective_samples: share of its samples that a prompt is worth to the new policy, mean over prompts, in [0, 1].
        num_prompts, num_prompts_k: different prompts, and those of them with k samples or more.
        level: pass@1 and pass@k before the window, from the same samples.
        level_1_change_cov, level_k_change_cov: covariances of the levels' and the changes' errors.
        per_prompt, per_prompt_k: [m] change of p and of 1-(1-p)^k of each row's prompt; the latter NaN where n < k.
        groups: the changes by group label.
    """

    k: int
    pass_at_1: float
    pass_at_1_se: float
    pass_at_k: float
    pass_at_k_se: float
    degrees: float
    degrees_k: float
    effective_samples: float
    num_prompts: int
    num_prompts_k: int
    level: LevelEstimate
    level_1_change_cov: float
    level_k_change_cov: float
    per_prompt: Tensor = field(repr=False)
    per_prompt_k: Tensor = field(repr=False)
    groups: Mapping[Hashable, GroupChange] = field(default_factory=dict)


def estimate_change(
    log_ratios: Tensor,
    correct: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    groups: Sequence[Hashable] | Tensor | None = None,
    keys: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
    noise: float | None = None,
    sampler: Tensor | None = None,
) -> ChangeEstimate:
    r"""How much pass@1 and pass@k changed from the policy that drew the samples to the one that scored them again.

    $D_1 = \frac1n \sum_i (\rho_i - 1)(r_i - b_i)$ and $D_k = [e_k(1) - e_k(\rho)] / \binom{n}{k}$ over the wrong
    samples, less control variates fitted on the other prompts; then means over prompts. Exactly unbiased for k <= n.

    Args:
        log_ratios: [m, n] log of new over old probability of each completion, whole sequences.
        correct: [m, n] 1 right, 0 wrong, -1 no verdict; a sample without one does not count.
        k: from 1 to the samples of a prompt. A prompt with fewer samples does not enter pass@k.
        mask: [m, n] bool, False for samples that do not count; None: all do. It must not depend on the verdicts.
        groups: m labels, such as difficulties; None for none.
        keys: m names of the prompts. Rows of one name are one prompt with the samples of all of them.
        clusters: m names of what the prompts come from, such as a template. The errors take prompts of one cluster to
            be one draw; None: prompts are independent.
        noise: standard deviation of the log ratios from rounding alone. The errors contain it in any case, since they
            are the spread over prompts. Where it is not the rounding of the sampler too, it makes the mean ratio
            exp(noise^2/2): half its square is taken off the log ratios. Where it is, nothing was to be taken off: the
            error of pass@k contains the difference. pass@1 has none to speak of, as its samples' weights add up to 0.
        sampler: [m, n] log of the old policy's probability over that of what was sampled from, where this is something
            else, as vLLM in another precision. Both policies are then weighed against it, and rounding, which is in
            both weights alike, is not taken off. None: the old policy was sampled.

    Raises:
        GuardError: shapes that do not fit, a log ratio that is no number or whose ratio is beyond float64, a verdict
            other than 1, 0 and -1, k < 1, fewer than 3 prompts (with k samples), or a prompt without any sample.
    """
    noise = _checked_noise(noise) if sampler is None else 0.0
    samples = checked_samples(correct, k, log_ratios=log_ratios, sampler=sampler, mask=mask, keys=keys, noise=noise)
    cluster = _cluster_of_each(samples.prompt, clusters)
    level, levels = _levels(samples, k, cluster)
    one, many = adjusted(prompt_changes(samples.log_ratios, samples.right, samples.counted, k, samples.sampler))
    enough = ~many.isnan()
    cluster_k = cluster[enough].unique(return_inverse=True)[1]
    change_1, change_k = _mean_and_error(one, cluster), _mean_and_error(many[enough], cluster_k)
    if noise:
        given = torch.where(samples.counted, samples.log_ratios + noise**2 / 2, 0.0)
        as_given = adjusted(prompt_changes(given, samples.right, samples.counted, k))[1]
        change_k = change_k[0], math.hypot(change_k[1], change_k[0] - float(as_given[enough].mean()))
    return ChangeEstimate(
        k=k,
        pass_at_1=change_1[0],
        pass_at_1_se=change_1[1],
        pass_at_k=change_k[0],
        pass_at_k_se=change_k[1],
        degrees=_degrees(one, cluster),
        degrees_k=_degrees(many[enough], cluster_k),
        effective_samples=float(effective_share(samples.sampler + samples.log_ratios, samples.counted).mean()),
        num_prompts=level.num_prompts,
        num_prompts_k=level.num_prompts_k,
        level=level,
        level_1_change_cov=_covariance(levels[0], one, cluster),
        level_k_change_cov=_covariance(levels[1], many[enough], cluster_k),
        per_prompt=one[samples.prompt],
        per_prompt_k=many[samples.prompt],
        groups={} if groups is None else _by_group(groups, samples.prompt, one, many, cluster),
    )


def estimate_level(
    correct: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    keys: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
) -> LevelEstimate:
    """pass@1 and pass@k of the policy that drew the samples; arguments and errors as in `estimate_change`."""
    samples = checked_samples(correct, k, mask=mask, keys=keys)
    return _levels(samples, k, _cluster_of_each(samples.prompt, clusters))[0]


@dataclass(frozen=True)
class MeanChange:
    """Change of E[f] over one window of updates, f being a number that each completion has; means over prompts.

    Attributes:
        change: unbiased. change_se: its standard error over prompts, or over their clusters; infinite where a change
            leaves the range of float64.
        level: E[f] before the window, from the same samples. level_se: its standard error.
        level_change_cov: covariance of the errors of both.
        num_prompts: different prompts.
    """

    change: float
    change_se: float
    level: float
    level_se: float
    level_change_cov: float
    num_prompts: int


def estimate_mean_change(
    log_ratios: Tensor,
    scores: Tensor,
    *,
    keys: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
    noise: float | None = None,
    sampler: Tensor | None = None,
) -> MeanChange:
    r"""How much the mean of f changed from the policy that drew the samples to the one that scored them again.

    $D_f = \frac1n \sum_i (\rho_i - 1)(f_i - b_i)$, $b_i$ the mean of the others', less control variates fitted on the
    other prompts; then the mean over prompts. Exactly unbiased, since $E[\rho_i - 1] = 0$ and $b_i$ does not depend on
    sample i. On 0/1 scores it is pass@1's change of `estimate_change`.

    Args:
        log_ratios: [m, n] log of new over old probability of each completion, whole sequences.
        scores: [m, n] f of each completion, on a scale of about 1; one that is not finite does not count.
        keys, clusters, noise, sampler: as of `estimate_change`.

    Raises:
        GuardError: as `estimate_change`.
    """
    noise = _checked_noise(noise) if sampler is None else 0.0
    counts = torch.where(torch.as_tensor(scores).isfinite(), 0, -1)
    more: dict[str, Any] = {"log_ratios": log_ratios, "sampler": sampler, "keys": keys, "noise": noise}
    samples = checked_samples(counts, 1, scores=scores, **more)
    cluster = _cluster_of_each(samples.prompt, clusters)
    _require_prompts(len(samples.counted), len(samples.counted), 1)
    level = samples.scores.sum(1) / samples.counted.sum(1)
    change = mean_changes(samples.log_ratios, samples.scores, samples.counted, samples.sampler)
    together = _covariance(level, change, cluster)
    return MeanChange(*_mean_and_error(change, cluster), *_mean_and_error(level, cluster), together, len(level))


def _cluster_of_each(prompt: Tensor, clusters: Sequence[Hashable] | None) -> Tensor:
    """[M] number of each prompt's cluster, from those of the rows."""
    count = int(prompt.max()) + 1 if len(prompt) else 0
    if clusters is None:
        return torch.arange(count)
    if len(clusters) != len(prompt):
        raise GuardError(f"Expected one name in `clusters` for each of {len(prompt)} rows; found {len(clusters)}.")
    rows = numbered(clusters)
    cluster = torch.zeros(count, dtype=torch.int64).scatter_(0, prompt, rows)
    if not torch.equal(cluster[prompt], rows):
        raise GuardError("Expected one cluster for each prompt; found rows of one of `keys` with different `clusters`.")
    if (apart := len(cluster.unique())) < _FEWEST_PROMPTS:
        raise GuardError(
            f"Expected prompts of at least {_FEWEST_PROMPTS} clusters, over which the error is taken; found {apart}. "
            "Draw more prompts."
        )
    return cluster


def _levels(samples: Samples, k: int, cluster: Tensor) -> tuple[LevelEstimate, tuple[Tensor, Tensor]]:
    size, right = samples.counted.sum(1), samples.right.sum(1)
    enough = size >= k
    _require_prompts(len(size), int(enough.sum()), k)
    one, many = right / size.double(), pass_at_k(size[enough], right[enough], k)
    errors = (*_mean_and_error(one, cluster), *_mean_and_error(many, cluster[enough].unique(return_inverse=True)[1]))
    return LevelEstimate(*errors, len(one), len(many)), (one, many)


def _require_prompts(prompts: int, enough: int, k: int) -> None:
    if prompts < _FEWEST_PROMPTS:
        raise GuardError(
            f"Expected at least {_FEWEST_PROMPTS} different prompts, over which the error is taken; found {prompts}. "
            "Draw more prompts."
        )
    if enough < _FEWEST_PROMPTS:
        raise GuardError(
            f"Expected `k` samples or more of at least {_FEWEST_PROMPTS} prompts; found k={k}, and as many samples in "
            f"{enough} of {prompts} prompts. Draw more samples of each prompt or lower `k`."
        )


def _checked_noise(noise: float | None) -> float:
    value = 0.0 if noise is None else as_real(noise, "noise")
    if not 0 <= value < math.inf:
        raise GuardError(f"Expected `noise` >= 0 and finite, or None; found {value}.")
    return value


def _mean_and_error(values: Tensor, cluster: Tensor) -> tuple[float, float]:
    mean = float(values.mean())
    if not bool(values.isfinite().all()):
        return mean, math.inf
    parts = error_parts(values, cluster)
    return mean, float(parts.square().sum().sqrt()) if len(parts) > 1 else math.nan


def _covariance(a: Tensor, b: Tensor, cluster: Tensor) -> float:
    """Of the means of two values per prompt; 0 where one has no finite mean."""
    product = (error_parts(a, cluster) * error_parts(b, cluster)).sum()
    return float(product) if bool(product.isfinite()) else 0.0


def _degrees(values: Tensor, cluster: Tensor) -> float:
    """2C / (kurtosis - 1) of C clusters, in [3, C - 1]: of a variance that few carry (Satterthwaite 1946).

    For C = 3 the upper end wins.
    """
    square = error_parts(values, cluster).square()
    most, spread = len(square) - 1.0, float(square.var(correction=0) / square.mean().square())
    found = 2 * len(square) / spread if spread > 0 else most
    return min(max(found, _FEWEST_DEGREES), most)


def _by_group(
    groups: Sequence[Hashable] | Tensor, prompt: Tensor, one: Tensor, many: Tensor, cluster: Tensor
) -> dict[Hashable, GroupChange]:
    labels: list[Hashable] = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(labels) != len(prompt):
        raise GuardError(f"Expected one label of `groups` for each of {len(prompt)} rows; found {len(labels)}.")
    members: dict[Hashable, set[int]] = {}
    for label, row in zip(labels, prompt.tolist(), strict=True):
        members.setdefault(label, set()).add(row)
    if sum(len(rows) for rows in members.values()) > len(one):
        raise GuardError("Expected one group for each prompt; found rows of one of `keys` with different `groups`.")
    parts = {label: sorted(rows) for label, rows in members.items()}
    return {label: _group(one[rows], many[rows], cluster[rows]) for label, rows in parts.items()}


def _group(one: Tensor, many: Tensor, cluster: Tensor) -> GroupChange:
    enough = ~many.isnan()
    of_one, of_many = (c.unique(return_inverse=True)[1] for c in (cluster, cluster[enough]))
    return GroupChange(len(one), *_mean_and_error(one, of_one), *_mean_and_error(many[enough], of_many))
