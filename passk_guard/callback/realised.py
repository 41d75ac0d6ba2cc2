"""The realised change along a run: one window after another, what they add up to, and the verdict on the outcome."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passk_guard.change import (
    PASS_AT_1,
    ChangeEstimate,
    ChangeSums,
    CurveChange,
    Fused,
    HeldCurve,
    MeanChange,
    OutcomeRule,
    OutcomeState,
    OutcomeVerdict,
    RateChange,
    RunChange,
    change_by_solve_rate,
    estimate_change,
    estimate_level,
    estimate_mean_change,
    judge,
    missed_in_words,
)
from passk_guard.config import GuardConfig
from passk_guard.estimation.evidence import Check, RunEvidence
from passk_guard.probe.prompts import HeldOut
from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.probe.rescoring import Rescorer, Window, load_window, save_window
from passk_guard.utils.errors import FailedRefresh, GuardError
from passk_guard.utils.ranks import Ranks

MOST_GROUPS = 20

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class ChangeMemory:
    """Everything that the next window's report depends on, immutable.

    Attributes:
        sums, fused: of all windows so far.
        outcome: state of the verdict.
        evidence: that pass@1 is falling, of all windows together.
        since: optimizer steps at which pass@1 was last highest.
        rates: summed change and variance since then, of hard, medium and easy prompts.
        metric: what is held, with the level where that is not pass@1's.
    """

    sums: ChangeSums = field(default_factory=ChangeSums)
    fused: Fused = field(default_factory=Fused)
    outcome: OutcomeState = field(default_factory=OutcomeState)
    evidence: RunEvidence = field(default_factory=RunEvidence)
    since: int = 0
    rates: tuple[tuple[float, float], ...] = ((0.0, 0.0),) * 3
    metric: HeldCurve = field(default_factory=HeldCurve)

    @property
    def held(self) -> HeldCurve:
        """The level of what is held."""
        of_pass_at_1 = self.metric.name == PASS_AT_1
        return replace(self.metric, curve=self.fused.pass_at_1) if of_pass_at_1 else self.metric

    def holding(self, name: str) -> ChangeMemory:
        """The same with this to hold, of which nothing is known yet."""
        return replace(self, metric=HeldCurve(name, scale=float(name == PASS_AT_1)))

    def with_level(self, window: Window, k: int, source: HeldOut | None = None) -> ChangeMemory:
        """The same with the levels of a new sample; unchanged where it has too few prompts for an error."""
        correct, kept = _with_verdicts(window)
        keys = [window.keys[x] for x in kept.tolist()]
        metric, fused = self.metric, self.fused
        if window.scores is not None:
            metric = metric.on_the_scale_of(window.scores[window.scores.isfinite()])
        with suppress(GuardError):
            fused = fused.with_level(estimate_level(correct, k, clusters=_clusters(source, keys)))
        with suppress(GuardError):
            mean = _mean_change(window, torch.zeros_like(window.log_probs), metric, source)
            metric = metric if mean is None else metric.with_level(mean)
        return replace(self, fused=fused, metric=metric)

    def with_gap(self) -> ChangeMemory:
        """The same after updates that no window has seen."""
        sums, fused = self.sums.with_window(None), self.fused.with_window(None)
        return replace(self, sums=sums, fused=fused, metric=self.metric.with_window(None))

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> ChangeMemory:
        """The memory whose `asdict` this is."""
        evidence = saved["evidence"]
        return cls(
            sums=ChangeSums.restored(saved["sums"]),
            fused=Fused.restored(saved["fused"]),
            outcome=OutcomeState.restored(saved["outcome"]),
            evidence=RunEvidence(tuple(Check(**check) for check in evidence["checks"]), evidence["before"]),
            since=saved["since"],
            rates=tuple((float(change), float(variance)) for change, variance in saved["rates"]),
            metric=HeldCurve.restored(saved["metric"]) if "metric" in saved else HeldCurve(),
        )


@dataclass(frozen=True)
class WindowResult:
    """One window, and where the run stands after it.

    Attributes:
        k: the k of pass@k.
        began, ended: optimizer steps at its two ends.
        estimate: None where the window failed, for `reason`.
        noise: of the log ratios from rounding, as in `Window`.
        keys: of the prompts that were measured, in the order of `estimate.per_prompt`.
        rates: the change of hard, medium and easy prompts.
        memory: after this window.
        run: the change since the start.
        verdict: on the outcome.
        mean: the change of what is held, on the scale of its curve; None where that is pass@1, or unknown.
    """

    k: int
    began: int
    ended: int
    estimate: ChangeEstimate | None
    reason: str | None
    noise: float | None
    keys: Sequence[Hashable]
    rates: Sequence[RateChange]
    memory: ChangeMemory
    run: RunChange
    verdict: OutcomeVerdict
    mean: MeanChange | None = None

    def unfinished(self) -> WindowResult:
        """The same while its samples are kept for another refresh: the verdict waits for the end of the window."""
        return replace(self, verdict=replace(self.verdict, outcome=self.verdict.previous, exceeded=False, newly=False))

    @property
    def metrics(self) -> Metrics:
        """The numbers of the log row, by name."""
        k, found, total, fused = self.k, self.estimate, self.run, self.memory.fused
        numbers: Metrics = {
            "pass_at_1": fused.pass_at_1.now if math.isfinite(fused.pass_at_1.now_se) else None,
            "pass_at_1_se": fused.pass_at_1.now_se if math.isfinite(fused.pass_at_1.now_se) else None,
            f"pass_at_{k}": fused.pass_at_k.now if math.isfinite(fused.pass_at_k.now_se) else None,
            f"pass_at_{k}_se": fused.pass_at_k.now_se if math.isfinite(fused.pass_at_k.now_se) else None,
            "losing": None if self.verdict.outcome == "undetermined" else float(self.verdict.outcome == "losing"),
            "losing_p_value": self.memory.evidence.p_value,
        }
        if found is not None:
            numbers |= {
                "pass_at_1_change": found.pass_at_1,
                "pass_at_1_change_se": found.pass_at_1_se,
                f"pass_at_{k}_change": found.pass_at_k,
                f"pass_at_{k}_change_se": found.pass_at_k_se,
                "effective_samples": found.effective_samples,
            }
            if self.noise is not None:
                numbers["log_ratio_noise"] = self.noise
        if total.windows:
            for name, curve in (("pass_at_1", total.pass_at_1), (f"pass_at_{k}", total.pass_at_k)):
                numbers |= {
                    f"{name}_total": curve.total,
                    f"{name}_total_ci_low": curve.ci_low,
                    f"{name}_total_ci_high": curve.ci_high,
                }
        return numbers

    def message(self, action: str) -> str:
        """The line that reports a change of the verdict."""
        loss, memory, outcome = self.verdict.loss, self.memory, self.verdict.outcome
        if outcome in ("undetermined", "holding"):
            return f"{outcome.upper()}: {self.verdict.reason}"
        change, since = (loss, f"since step {memory.since}") if outcome == "losing" else (self.run, "since the start")
        parts = [
            f"{outcome.upper()} pass@1: {_interval(change.pass_at_1)} {since}{missed_in_words(change.missed)}, "
            f"pass@{change.k} {_interval(change.pass_at_k)}"
        ]
        if outcome == "losing":
            hard, _, easy = (total for total, _ in memory.rates)
            parts.append(f"easy prompts {easy:+.3f}, hard {hard:+.3f}")
            parts.append(f"p = {memory.evidence.p_value:.2g} over the whole run")
        return "; ".join([*parts, f"action: {action}"])

    def details(self, text: Callable[[Hashable], str]) -> dict[str, Any]:
        """What the journal holds besides the numbers of the row; `text` gives a prompt's."""
        found, one = self.estimate, self.run.pass_at_1
        return {
            "since": self.began,
            "k": self.k,
            "outcome": self.verdict.outcome,
            "reason": self.verdict.reason,
            "prompts": None if found is None else found.num_prompts,
            "windows": self.run.windows,
            "missed": self.run.missed,
            "sequence": [one.seq_low, one.seq_high],
            "solve_rates": [asdict(rate) for rate in self.rates],
            "groups": {} if found is None else {str(label): asdict(group) for label, group in found.groups.items()},
            **{name: [[text(key), change] for key, change in movers] for name, movers in self.movers().items()},
        }

    def movers(self, count: int = 10) -> dict[str, list[tuple[Hashable, float]]]:
        """The prompts that lost and gained most in this window, with their change of p."""
        if self.estimate is None:
            return {}
        order = self.estimate.per_prompt.argsort().tolist()
        change = self.estimate.per_prompt.tolist()
        lost = [(self.keys[x], change[x]) for x in order[:count] if change[x] < 0]
        gained = [(self.keys[x], change[x]) for x in reversed(order[-count:]) if change[x] > 0]
        return {"lost": lost, "gained": gained}


class RealisedChange:
    """The windows of a run: opened when completions are sampled, looked at before each refresh after that.

    Args:
        source: of the probe's completions; None for the training batch, whose samples steer the updates themselves.
        config: of the guard.

    Raises:
        GuardError: a prompt without the column `group_by`, or a column of more than 20 values.
    """

    def __init__(self, source: HeldOut | None, config: GuardConfig) -> None:
        self._source, self._config = source, config
        self._window: Window | None = None
        self._padding_checked = False
        self._groups = None if source is None or config.group_by is None else _groups_of(source, config.group_by)

    @property
    def enabled(self) -> bool:
        """Whether there is anything to measure."""
        return self._source is not None and self._config.instruments != "angle"

    @property
    def mismatch(self) -> dict[str, float | None]:
        """`Window.mismatch` of the open window."""
        return {} if self._window is None else self._window.mismatch

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass over the open window on this rank."""
        return 0 if self._window is None else sum(batch.input_ids.numel() for batch in self._window.batches)

    def look(self, rescorer: Rescorer, memory: ChangeMemory, step: int) -> WindowResult | None:
        """What the updates since the window was opened did; None where none is open, or there were no updates."""
        if self._window is None or step == self._window.step:
            return None
        return close_window(self._window, rescorer, memory, step, self._config, self._groups, self._source)

    def open(
        self,
        rescorer: Rescorer,
        sampled: tuple[Rollouts, Outcomes],
        keys: Sequence[Hashable],
        memory: ChangeMemory,
        step: int,
        measured: Tensor,
    ) -> ChangeMemory:
        """Open a window on what has just been sampled; the one before is over.

        Args:
            sampled: this rank's rollouts and their outcomes.
            keys: identities of the prompts over all ranks.
            memory: with the window before, where that was looked at.
            step: optimizer steps taken so far.
            measured: [m] bool, False for prompts that steer the updates to come.

        Raises:
            FailedRefresh: on all ranks, where the completions could not be scored. No window is open then.
            GuardError: on all ranks, where the model reads the padding of a batch; the same.
        """
        unseen = self._window is None and memory.fused.pass_at_1.level is not None
        self._window = None
        window = rescorer.open(*sampled, keys, step, measured)
        self._padding_checked = self._padding_checked or rescorer.check_padding(window)
        self._window = window
        return (memory.with_gap() if unseen else memory).with_level(self._window, self._config.k, self._source)

    def prompt(self, key: Hashable) -> str:
        """The text of a prompt of the probe."""
        return self._prompts.get(str(key), str(key))

    @cached_property
    def _prompts(self) -> dict[str, str]:
        probe = None if self._source is None else self._source.probe
        return {} if probe is None else {str(probe.key(i)): str(row["prompt"]) for i, row in enumerate(probe.rows)}

    def drop(self) -> None:
        """No window is open any more."""
        self._window = None

    def save(self, checkpoint: Path, rank: int) -> None:
        """Write this rank's part of the open window into a checkpoint."""
        if self._window is not None:
            save_window(self._window, checkpoint / f"passk_guard_window_rank{rank}.pt")

    def resume(self, checkpoint: Path, ranks: Ranks) -> None:
        """Go on with the window of a checkpoint; where one rank has none, no rank has."""
        found = load_window(checkpoint / f"passk_guard_window_rank{ranks.index}.pt", ranks.device)
        self._window = None if ranks.max(int(found is None)) else found


def _groups_of(source: HeldOut, column: str) -> dict[str, str]:
    """The label of each prompt, by the name that the prompt has in a checkpoint too."""
    labels = source.probe.labels("group_by", column)
    found = {str(source.probe.key(i)): label for i, label in enumerate(labels)}
    if len(values := set(found.values())) > MOST_GROUPS:
        raise GuardError(
            f"Expected at most {MOST_GROUPS} groups in the column group_by={column!r}; found {len(values)}. Pass a "
            "column of few values, such as a difficulty or a source."
        )
    return found


def close_window(
    window: Window,
    rescorer: Rescorer,
    memory: ChangeMemory,
    step: int,
    config: GuardConfig,
    groups: Mapping[str, str] | None = None,
    source: HeldOut | None = None,
) -> WindowResult:
    """Score the completions of a window once more, and say what the updates since did. It never raises for data.

    Args:
        window: opened at an earlier step.
        rescorer: of the present policy.
        memory: before this window.
        step: optimizer steps taken by now.
        config: k, confidence, cooldown, min_effective_samples and max_loss.
        groups: label of each prompt key, where the user asked for groups.
        source: which prompts are not independent; None: all are.
    """
    correct, kept = _with_verdicts(window)
    keys = [window.keys[x] for x in kept.tolist()]
    estimate, mean, rates, reason = None, None, list[RateChange](), None
    sooner = "raise `overhead`" if config.refresh_steps is None else "lower `refresh_steps`"
    try:
        every = rescorer.log_ratios(window)
        log_ratios = every[kept]
        labels = None if groups is None else [groups[str(key)] for key in keys]
        clusters = _clusters(source, keys)
        apart = None if window.sampler is None else window.sampler[kept]
        more: dict[str, Any] = {"keys": keys, "clusters": clusters, "noise": window.noise, "sampler": apart}
        estimate = estimate_change(log_ratios, correct, config.k, groups=labels, **more)
        rates = change_by_solve_rate(log_ratios, correct, clusters=clusters, sampler=apart)
        reason = _too_far(window, estimate, config, sooner)
        if reason is None:
            with suppress(GuardError):
                mean = _mean_change(window, every, memory.metric, source)
            if mean is not None and mean.change_se == 0 and estimate.effective_samples < 1:
                mean = None  # no prompt has samples of different scores, so that nothing is known
            reason = _says_nothing(estimate, sooner)
    except (FailedRefresh, GuardError) as error:  # a GuardError here is a fault of the data, and not of the user
        reason = str(error)
    if reason is not None:
        estimate, rates = None, []
    return _concluded(window, step, estimate, mean, rates, keys, reason, memory, config)


def _concluded(
    window: Window,
    step: int,
    estimate: ChangeEstimate | None,
    mean: MeanChange | None,
    rates: Sequence[RateChange],
    keys: Sequence[Hashable],
    reason: str | None,
    memory: ChangeMemory,
    config: GuardConfig,
) -> WindowResult:
    rule = OutcomeRule(config.confidence, config.cooldown, max_loss=config.max_loss)
    sums = memory.sums.with_window(estimate)
    evidence = memory.evidence
    if estimate is not None:
        evidence = evidence.with_check(_check(estimate))
    run = sums.change(rule.confidence)
    begins = memory.outcome.falling.windows == 0
    outcome, verdict = judge(memory.outcome, estimate, run, evidence.p_value, rule)
    if verdict.changed and verdict.previous == "losing":
        evidence = evidence.restarted()
    before = ((0.0, 0.0),) * 3 if begins else memory.rates
    found = [
        (r.pass_at_1, r.pass_at_1_se**2) if r.share and not math.isnan(r.pass_at_1_se) else (0.0, 0.0) for r in rates
    ]
    after = ChangeMemory(
        sums=sums,
        fused=memory.fused.with_window(estimate),
        outcome=outcome,
        evidence=evidence,
        since=window.step if begins else memory.since,
        rates=tuple((a + c, b + d) for (a, b), (c, d) in zip(before, found or before, strict=True))
        if found
        else before,
        metric=memory.metric if window.scores is None else memory.metric.with_window(mean),
    )
    return WindowResult(
        config.k, window.step, step, estimate, reason, window.noise, keys, rates, after, run, verdict, mean
    )


def _too_far(window: Window, estimate: ChangeEstimate, config: GuardConfig, sooner: str) -> str | None:
    """Why the completions are worth too little to the present policy; None where they are not."""
    share, least = window.mismatch.get("sampler_effective_samples"), config.min_effective_samples
    if share is not None and share < least:
        return (
            f"the sampler and the model disagree: as samples of the model the completions are worth {share:.2f} of "
            f"their number, below min_effective_samples={least:g}"
        )
    if estimate.effective_samples < least:
        return (
            f"the policy moved so far that the samples are worth {estimate.effective_samples:.2f} of their number, "
            f"below min_effective_samples={least:g}: {sooner}"
        )
    return None


def _says_nothing(estimate: ChangeEstimate, sooner: str) -> str | None:
    """Why nothing is known of pass@1; None where something is."""
    if estimate.pass_at_1_se == 0 and estimate.effective_samples < 1:
        return (
            "no prompt has right and wrong samples, so that nothing is known of the change: choose prompts that are "
            "solved sometimes"
        )
    if not math.isfinite(estimate.pass_at_1_se):
        return f"an importance ratio is beyond what a number can hold: {sooner}"
    return None


def _check(found: ChangeEstimate) -> Check:
    """A window as a check for a loss of pass@1."""
    return Check(-found.pass_at_1, found.pass_at_1_se**2, found.degrees)


def _interval(curve: CurveChange) -> str:
    return f"{curve.total:+.3f} [{curve.ci_low:+.3f}, {curve.ci_high:+.3f}]"


def _mean_change(window: Window, log_ratios: Tensor, held: HeldCurve, source: HeldOut | None) -> MeanChange | None:
    """The change of the mean that is held, over the prompts with a score; None where there are none to hold.

    Raises:
        GuardError: too few prompts for an error.
    """
    if window.scores is None or not held.scale:
        return None
    kept = window.scores.isfinite().any(1).nonzero().squeeze(1)
    keys = [window.keys[x] for x in kept.tolist()]
    apart = None if window.sampler is None else window.sampler[kept]
    more: dict[str, Any] = {"keys": keys, "clusters": _clusters(source, keys), "noise": window.noise, "sampler": apart}
    return estimate_mean_change(log_ratios[kept], held.units(window.scores[kept]), **more)


def _clusters(source: HeldOut | None, keys: Sequence[Hashable]) -> Sequence[Hashable] | None:
    return None if source is None else source.independent(keys)


def _with_verdicts(window: Window) -> tuple[Tensor, Tensor]:
    """Verdicts [M, n] of the prompts that have one, and their numbers [M]."""
    kept = (window.correct >= 0).any(1).nonzero().squeeze(1)
    return window.correct[kept], kept
