"""Samples of another policy, reweighted to the current one while that is precise enough.

They are of an earlier policy, where one sample of completions serves several refreshes, or of an engine that computes
in another precision or with other kernels: what vLLM samples is not quite what the model would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from passk_guard.estimation.records import ProbeGram
from passk_guard.passk.importance import effective_share, miss_estimates
from passk_guard.probe.out_of_memory import halved, largest, until_it_fits
from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.probe.refresh import Refresh, Refresher
from passk_guard.probe.score_sums import add_reweighted_scores_
from passk_guard.utils.errors import FailedRefresh


class RolloutKeeper:
    """Choose at each refresh, alike on every rank, between the kept rollouts and fresh ones.

    Rollouts are not saved in a checkpoint. The caller drops them at each, so that a resumed run samples at the same
    refreshes as an uninterrupted one.

    Args:
        refreshes: number of refreshes that use one sample, >= 1; 1 keeps nothing.
        least: effective sample size, as a share, below which a sample is dropped, in (0, 1].
    """

    def __init__(self, refreshes: int, least: float) -> None:
        self._refreshes, self._least = refreshes, least
        self._kept: Refresh | None = None
        self._used = 0
        self._share = 1.0
        self._resampled_at: float | None = None
        self._sampler: dict[str, float | None] = {}

    def refresh(
        self,
        refresher: Refresher,
        sample: Callable[[], tuple[Rollouts, Outcomes]],
        keys: Sequence[Hashable],
        seed: int,
    ) -> Refresh:
        """Reweight the kept rollouts if their effective sample size allows it, else run `Refresher.run` on fresh ones.

        Samples of another engine than the model are reweighted at once, and are fresh nevertheless.

        Raises:
            FailedRefresh: on all ranks; drop the rollouts then.
        """
        self._share, self._resampled_at, self._sampler = 1.0, None, {}
        if self._kept is not None and self._used < self._refreshes:
            again, self._share = reweigh(self._kept, refresher, seed, self._least)
            self._used += 1
            if again is not None:
                self._kept = replace(self._kept, batches=again.batches, log_probs=again.log_probs)
                return again
            self._share, self._resampled_at = 1.0, self._share
        self.drop()
        sampled = replace(refresher, keeps_log_probs=self._refreshes > 1).run(sample, keys, seed)
        if sampled.unscored:
            sampled = self._of_the_model(sampled, refresher, seed)
        if self._refreshes > 1 and sampled.batches:
            empty = torch.empty(0, 0, dtype=torch.float64)  # each refresh computes its own
            probe = replace(sampled.probe, gram=empty, misses=None, corrected=False)
            self._kept, self._used = replace(sampled, probe=probe, remark=None), 1
        return sampled

    def _of_the_model(self, sampled: Refresh, refresher: Refresher, seed: int) -> Refresh:
        """Another engine's samples as samples of the model, by the ratios of their probabilities."""
        found, share = reweigh(sampled, refresher, seed, self._least)
        if found is None:
            raise FailedRefresh(
                "the sampler and the model disagree: as samples of the model the completions are worth "
                f"{share:.2f} of their number, below min_effective_samples={self._least:g}. Are temperature, "
                "truncation and weights the same?"
            )
        logs = [b.factors.log()[b.slots >= 0].double().cpu() for b in found.batches if b.factors is not None]
        squares = torch.cat(logs).square()
        total, number = refresher.ranks.sum(torch.stack([squares.sum(), torch.ones_like(squares).sum()])).tolist()
        self._sampler = {"sampler_mismatch": math.sqrt(total / number), "sampler_effective_samples": share}
        return replace(found, probe=replace(found.probe, corrected=True), unscored=False)

    def drop(self) -> None:
        """Sample at the next refresh."""
        self._kept = None

    def metrics(self) -> dict[str, float | None]:
        """Of the newest refresh: effective sample size, as a share, and that of the sample it dropped, if it did.

        Of fresh samples of another engine than the model: root mean square log ratio of a completion's two
        probabilities, in nats, and what share of their number they are worth as samples of the model.
        """
        if self._refreshes == 1:
            return self._sampler
        return {"effective_samples": self._share, "resampled_at": self._resampled_at} | self._sampler


def reweigh(sampled: Refresh, refresher: Refresher, seed: int, least: float) -> tuple[Refresh | None, float]:
    """Make a refresh of the current policy from samples of an earlier one, in one pass over them.

    Args:
        sampled: an earlier refresh with the log-probabilities of its samples.
        seed: of the projections.
        least: effective sample size required, as a share, on average over the prompts with a gradient.

    Returns:
        The refresh, whose batches hold the ratios as `factors` and whose `log_probs` are those of the earlier policy;
        None below `least`, and where a ratio or an inner product overflows. Then the share.

    Raises:
        FailedRefresh: on all ranks, when a pass failed on one.
    """
    ranks, m = refresher.ranks, sampled.num_samples.numel()
    ratios = list[Tensor]()

    def add(total: Tensor, i: int) -> Tensor:
        batch, then = sampled.batches[i], sampled.log_probs[i]
        total, ratio = add_reweighted_scores_(total, refresher.sketcher, batch, sampled.temperature, then)
        ratios.append(ratio)
        return total

    def attempt() -> Tensor:
        ratios.clear()
        return refresher.score_sums(len(sampled.batches), add, 2 * m, seed)

    def smaller() -> bool:
        nonlocal sampled
        if largest(ranks, sampled.batches)[1] <= 1:
            return False
        sampled = _in_halves(sampled)
        return True

    sums = until_it_fits(ranks, attempt, smaller)
    misses, share = _effective(refresher, sampled, ratios)
    kept = (sampled.num_samples >= sampled.fewest).nonzero().squeeze(1)
    gram = refresher.gram(sums, kept)
    finite = bool(gram.isfinite().all()) and bool(misses.isfinite().all())
    if not finite or share < least:
        return None, share if finite else 0.0
    batches = [replace(batch, factors=ratio.exp()) for batch, ratio in zip(sampled.batches, ratios, strict=True)]
    probe = ProbeGram(
        gram, sampled.num_samples[kept], sampled.num_correct[kept], sampled.probe.prompt_keys, misses[kept]
    )
    return replace(sampled, probe=probe, batches=batches), share


def _effective(refresher: Refresher, sampled: Refresh, ratios: Sequence[Tensor]) -> tuple[Tensor, float]:
    """[m, n] misses of all prompts, and the mean effective share of those with a gradient, over all ranks."""
    m, n = sampled.num_samples.numel(), int(sampled.num_samples.max())

    def own() -> Tensor:
        slots = torch.cat([batch.slots.cpu() for batch in sampled.batches])
        log_ratios, wrong, counted = _by_prompt(torch.cat(list(ratios)), slots, m, n)
        here = counted.any(1)
        if bool((counted.sum(1) != sampled.num_samples)[here].any()):
            raise FailedRefresh("the samples of a prompt are on several ranks, and their ratios belong together")
        misses = miss_estimates(log_ratios, wrong, sampled.num_samples)
        share = effective_share(log_ratios, counted)
        found = torch.cat([misses, share[:, None], torch.ones_like(share)[:, None]], 1)
        return torch.where(here[:, None], found, 0.0)

    table = refresher.ranks.sum(refresher.ranks.together(own))
    return table[:, :n], float(table[:, n].sum() / table[:, n + 1].sum())


def _by_prompt(log_ratios: Tensor, slots: Tensor, m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """[m, n] log ratios, whether each is of a wrong sample, and whether there is one; from samples in any order."""
    log_ratios, slots = log_ratios[slots >= 0], slots[slots >= 0]
    prompt, order = (slots % m).sort(stable=True)
    place = torch.arange(len(prompt)) - torch.searchsorted(prompt, prompt)
    values = torch.zeros(m, n, dtype=torch.float64)
    wrong, counted = torch.zeros(m, n, dtype=torch.bool), torch.zeros(m, n, dtype=torch.bool)
    values[prompt, place] = log_ratios[order]
    wrong[prompt, place] = slots[order] >= m
    counted[prompt, place] = True
    return values, wrong, counted


def _in_halves(sampled: Refresh) -> Refresh:
    """The same samples in batches of half the size, as `halved` makes them, each with its log-probabilities."""
    pieces, log_probs = halved(sampled.batches), list[Tensor]()
    for i, whole in enumerate(sampled.log_probs):
        first = len(pieces[2 * i].slots)
        rest = whole[first:] if first < len(whole) else torch.zeros(1, dtype=torch.float64)
        log_probs += [whole[:first], rest]
    return replace(sampled, batches=pieces, log_probs=log_probs)
