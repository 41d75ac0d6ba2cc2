r"""What dumped rollouts say without a model: pass@k, whom pass@k would train on, and what updates did to both.

Whom an update listens to is told by the advantages: a prompt's part of $\sum |A_k|$ (`passk_advantages`), which tends
to $2 w_k(p) p (1 - p)$ per sample as n grows. A prompt that is never or always solved has none, whatever its weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passk_guard.analysis.estimates import mean, wilson, with_error
from passk_guard.analysis.measure import weight_of
from passk_guard.analysis.results import Number
from passk_guard.analysis.rollout_file import FEWEST_PROMPTS, DumpedPrompt, as_matrices, read_rollouts
from passk_guard.analysis.rollout_results import Part, PromptRates, RateAtK, RolloutAnalysis
from passk_guard.change import change_by_solve_rate, estimate_change
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.passk.closed_forms import pass_at_k, sample_coefficients, unbiased_passk_weight
from passk_guard.utils.arguments import as_real
from passk_guard.utils.clusters import error_parts, numbered
from passk_guard.utils.errors import GuardError

_HARD = 1 / 3
_KEPT = 0.9


def analyze_rollouts(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    *,
    ks: Sequence[int] | None = None,
    correct_threshold: float = 1.0,
    confidence: float = 0.95,
    cluster_by: str | None = None,
) -> RolloutAnalysis:
    """Read rollouts that were dumped, and measure what they say: pass@k, and the realised change where they tell it.

    Args:
        path, columns, cluster_by: as for `read_rollouts`. correct_threshold: rewards at or above it are correct.
        ks: the k of pass@k; 1 is always among them. None takes powers of two, up to half of the verdicts that nine in
            ten prompts have: near k = n the few prompts with a single right sample decide.
        confidence: of the intervals.

    Raises:
        GuardError: as `read_rollouts` and `estimate_change`; or k < 1; or fewer than 3 prompts with as many verdicts as
            the largest k.
    """
    confidence, threshold = as_real(confidence, "confidence"), as_real(correct_threshold, "correct_threshold")
    if not 0 < confidence < 1:
        raise GuardError(f"Expected 0 < `confidence` < 1; found {confidence}.")
    found = read_rollouts(path, columns, threshold=threshold, cluster_by=cluster_by)
    ks = _chosen(ks, sorted(prompt.num_samples for prompt in found))
    kept = [prompt for prompt in found if prompt.num_samples >= ks[-1]]
    if len(kept) < FEWEST_PROMPTS:
        raise GuardError(
            f"Expected at least {FEWEST_PROMPTS} prompts with {ks[-1]} verdicts, the largest k; found {len(kept)} of "
            f"{len(found)}. Lower k."
        )
    measured = _Measured(kept, ks, confidence)
    rollouts = [len(prompt.correct) for prompt in kept]
    return RolloutAnalysis(
        name=Path(path).name,
        settings={
            "confidence": confidence,
            "ks": list(ks),
            "correct_threshold": threshold,
            "columns": dict(columns or {}),
            "cluster_by": cluster_by,
        },
        num_rollouts=sum(len(prompt.correct) for prompt in found),
        no_verdict=sum(prompt.correct.count(-1) for prompt in found),
        fewest=min(rollouts),
        most=max(rollouts),
        num_prompts=len(kept),
        left_out=len(found) - len(kept),
        different=_different(kept),
        effective_samples=None if measured.changes is None else measured.changes[ks[-1]].effective_samples,
        at_k=[measured.at(k) for k in ks],
        hard=measured.part("hard", (measured.rate < _HARD).nonzero().flatten()),
        solve_rates=measured.histogram(),
        groups=measured.groups(),
        change_by_solve_rate=measured.change_by_solve_rate(),
        prompts=measured.prompts(),
    )


def _chosen(ks: Sequence[int] | None, samples: Sequence[int]) -> tuple[int, ...]:
    if ks is None:
        n = samples[int((1 - _KEPT) * len(samples))]
        return tuple(2**i for i in range(max(1, n // 2, min(n, 2)).bit_length()))
    if any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in ks):
        raise GuardError(f"Expected whole numbers k >= 1; found {list(ks)}.")
    return tuple(sorted({1, *ks}))


def _different(prompts: Sequence[DumpedPrompt]) -> float | None:
    shares = [len(set(prompt.completions)) / len(prompt.completions) for prompt in prompts if prompt.completions]
    return sum(shares) / len(shares) if shares else None


class _Measured:
    """The numbers of all prompts, from which the parts are taken."""

    def __init__(self, prompts: Sequence[DumpedPrompt], ks: Sequence[int], confidence: float) -> None:
        self._prompts, self._ks, self._confidence = prompts, ks, confidence
        self._n = torch.tensor([prompt.num_samples for prompt in prompts])
        self._c = torch.tensor([prompt.num_correct for prompt in prompts])
        self.rate = self._c.double() / self._n
        names = [prompt.cluster if prompt.cluster is not None else i for i, prompt in enumerate(prompts)]
        self._cluster = numbered(names)
        self._mass = {k: self._advantages(k) for k in (1, ks[-1])}
        self._weight = unbiased_passk_weight(self._n, self._c, ks[-1])
        clusters = None if prompts[0].cluster is None else names
        groups = None if prompts[0].group is None else [str(prompt.group) for prompt in prompts]
        self.changes, self._by_rate = None, []
        if any(prompt.log_ratios for prompt in prompts):
            correct, log_ratios, there = as_matrices(prompts)
            self.changes = {
                k: estimate_change(log_ratios, correct, k, mask=there, groups=groups, clusters=clusters) for k in ks
            }
            self._by_rate = change_by_solve_rate(log_ratios, correct, mask=there, clusters=clusters)

    def _advantages(self, k: int) -> Tensor:
        """[m] mean |A_k| over the samples of each prompt."""
        right, wrong = sample_coefficients(self._n, self._c, k)
        return self._c * right - (self._n - self._c) * wrong

    def at(self, k: int) -> RateAtK:
        rate = mean(pass_at_k(self._n, self._c, k), self._confidence, self._cluster, low=0.0, high=1.0)
        weight = mean(unbiased_passk_weight(self._n, self._c, k), self._confidence, self._cluster, low=0.0)
        if self.changes is None:
            return RateAtK(k, rate, weight, None)
        found = self.changes[k]
        if k == 1:
            return RateAtK(k, rate, weight, self._change(found.pass_at_1, found.pass_at_1_se, found.degrees))
        return RateAtK(k, rate, weight, self._change(found.pass_at_k, found.pass_at_k_se, found.degrees_k))

    def _change(self, value: float, error: float, degrees: float | None = None) -> Number:
        if not math.isfinite(value):
            return Number()
        if not math.isfinite(error):
            return Number(value)
        if degrees is None or not error:
            return Number(value, error)
        return with_error(value, error, student_t_quantile((1 + self._confidence) / 2, degrees))

    def part(self, name: str, rows: Tensor) -> Part:
        """The prompts of some rows, of which there may be none."""
        inside = torch.zeros(len(self._n)).index_fill(0, rows, 1.0).double()
        cluster = numbered(self._cluster[rows].tolist())
        weight = mean(self._weight[rows], self._confidence, cluster, low=0.0) if len(rows) else Number()
        shares = [self._share(inside, self._mass[k]) for k in (1, self._ks[-1])]
        return Part(name, len(rows), weight, *shares)

    def _share(self, inside: Tensor, mass: Tensor) -> Number:
        """A ratio of two means over prompts, with its error to first order."""
        if not float(mass.sum()) > 0:
            return Number()
        share = float((inside * mass).sum() / mass.sum())
        parts = error_parts((inside - share) * mass, self._cluster) / float(mass.mean())
        return Number(share, float(parts.norm())) if len(parts) > 1 else Number(share)

    def histogram(self) -> list[Part]:
        tenth = torch.where(self._c == 0, -1, torch.where(self._c == self._n, 10, 10 * self._c // self._n))
        names = {-1: "never", 10: "always"} | {i: f"{i / 10:.1f} to {(i + 1) / 10:.1f}" for i in range(10)}
        return [self.part(names[i], (tenth == i).nonzero().flatten()) for i in sorted(set(tenth.tolist()))]

    def groups(self) -> list[Part]:
        if self._prompts[0].group is None:
            return []
        found = []
        for name in sorted({str(prompt.group) for prompt in self._prompts}):
            rows = torch.tensor([i for i, prompt in enumerate(self._prompts) if prompt.group == name])
            part = self.part(name, rows)
            if self.changes is not None:
                one = self.changes[self._ks[-1]].groups[name]
                change, change_k = (one.pass_at_1, one.pass_at_1_se), (one.pass_at_k, one.pass_at_k_se)
                part = replace(part, change=self._change(*change), change_k=self._change(*change_k))
            found.append(part)
        return found

    def change_by_solve_rate(self) -> list[dict[str, Any]]:
        return [
            {"low": one.low, "high": one.high, "share": one.share}
            | {"change": self._change(one.pass_at_1, one.pass_at_1_se)}
            for one in self._by_rate
        ]

    def prompts(self) -> list[PromptRates]:
        k, found = self._ks[-1], []
        mass = self._mass[k] / (total if (total := float(self._mass[k].sum())) > 0 else 1.0)
        changes = None if self.changes is None else self.changes[k].per_prompt.tolist()
        for i, prompt in enumerate(self._prompts):
            n, c = prompt.num_samples, prompt.num_correct
            rate = wilson(c, n, self._confidence)
            weight = weight_of(float(self._weight[i]), rate, k)
            change = None if changes is None or not math.isfinite(changes[i]) else changes[i]
            found.append(PromptRates(prompt.text, n, c, rate, weight, float(mass[i]), change))
        return found
