"""One draw of completions for several refreshes, reweighted to the policy of the moment while it is worth it."""

from __future__ import annotations

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
    """Decides at each refresh, alike on every rank, between the rollouts that are kept and fresh ones.

    Nothing of them goes into a checkpoint: whoever drops them at each makes the run that goes on and one that is
    resumed sample at the same refresh.

    Args:
        refreshes: that one draw serves, >= 1; 1 keeps nothing.
        least: effective share below which a draw is thrown away, in (0, 1].
    """

    def __init__(self, refreshes: int, least: float) -> None:
        self._refreshes, self._least = refreshes, least
        self._drawn: Refresh | None = None
        self._used = 0
        self._share = 1.0
        self._left_at: float | None = None

    def refresh(
        self,
        refresher: Refresher,
        sample: Callable[[], tuple[Rollouts, Outcomes]],
        keys: Sequence[Hashable],
        seed: int,
    ) -> Refresh:
        """From the kept rollouts where there are some and they are worth it, else from fresh ones; as `Refresher.run`.

        Raises:
            FailedRefresh: on all ranks; drop the rollouts then.
        """
        self._share, self._left_at = 1.0, None
        if self._drawn is not None and self._used < self._refreshes:
            again, self._share = look_again(self._drawn, refresher, seed, self._least)
            self._used += 1
            if again is not None:
                self._drawn = replace(self._drawn, batches=again.batches, log_probs=again.log_probs)
                return again
            self._share, self._left_at = 1.0, self._share
        self.drop()
        drawn = replace(refresher, keeps_log_probs=self._refreshes > 1).run(sample, keys, seed)
        if self._refreshes > 1 and drawn.batches:
            probe = replace(drawn.probe, gram=torch.empty(0, 0, dtype=torch.float64))  # each look has its own
            self._drawn, self._used = replace(drawn, probe=probe, remark=None), 1
        return drawn

    def drop(self) -> None:
        """The next refresh samples afresh."""
        self._drawn = None

    def metrics(self) -> dict[str, float | None]:
        """Of the newest refresh: what its samples are worth, and what those were that it threw away, if it did."""
        if self._refreshes == 1:
            return {}
        return {"effective_samples": self._share, "resampled_at": self._left_at}


def look_again(drawn: Refresh, refresher: Refresher, seed: int, least: float) -> tuple[Refresh | None, float]:
    """A refresh of the present policy from samples of an earlier one, in one pass over them.

    Args:
        drawn: an earlier refresh with the log-probabilities of its samples.
        seed: of the projections.
        least: effective share, of the samples of a prompt with a gradient on average, that must be left.

    Returns:
        The refresh, whose batches hold the ratios as `factors` and whose `log_probs` are still those of the draw; None
        below `least`, and where a ratio or an inner product is beyond what a number can hold. Then the share.

    Raises:
        FailedRefresh: on all ranks, when a pass failed on one.
    """
    ranks, m = refresher.ranks, drawn.num_samples.numel()
    ratios = list[Tensor]()

    def add(total: Tensor, i: int) -> Tensor:
        batch, then = drawn.batches[i], drawn.log_probs[i]
        total, ratio = add_reweighted_scores_(total, refresher.sketcher, batch, drawn.temperature, then)
        ratios.append(ratio)
        return total

    def attempt() -> Tensor:
        ratios.clear()
        return refresher.score_sums(len(drawn.batches), add, 2 * m, seed)

    def smaller() -> bool:
        nonlocal drawn
        if largest(ranks, drawn.batches)[1] <= 1:
            return False
        drawn = _in_halves(drawn)
        return True

    sums = until_it_fits(ranks, attempt, smaller)
    misses, share = _worth(refresher, drawn, ratios)
    kept = (drawn.num_samples >= drawn.fewest).nonzero().squeeze(1)
    gram = refresher.gram(sums, kept)
    finite = bool(gram.isfinite().all()) and bool(misses.isfinite().all())
    if not finite or share < least:
        return None, share if finite else 0.0
    batches = [replace(batch, factors=ratio.exp()) for batch, ratio in zip(drawn.batches, ratios, strict=True)]
    probe = ProbeGram(gram, drawn.num_samples[kept], drawn.num_correct[kept], drawn.probe.prompt_keys, misses[kept])
    return replace(drawn, probe=probe, batches=batches), share


def _worth(refresher: Refresher, drawn: Refresh, ratios: Sequence[Tensor]) -> tuple[Tensor, float]:
    """[m, n] misses of all prompts, and the mean effective share of those with a gradient, over all ranks."""
    m, n = drawn.num_samples.numel(), int(drawn.num_samples.max())

    def own() -> Tensor:
        slots = torch.cat([batch.slots.cpu() for batch in drawn.batches])
        log_ratios, wrong, counted = _by_prompt(torch.cat(list(ratios)), slots, m, n)
        here = counted.any(1)
        if bool((counted.sum(1) != drawn.num_samples)[here].any()):
            raise FailedRefresh("the samples of a prompt are on several ranks, and their ratios belong together")
        misses = miss_estimates(log_ratios, wrong, drawn.num_samples)
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


def _in_halves(drawn: Refresh) -> Refresh:
    """The same samples in batches of half the size, as `halved` makes them, each with its log-probabilities."""
    pieces, log_probs = halved(drawn.batches), list[Tensor]()
    for i, whole in enumerate(drawn.log_probs):
        first = len(pieces[2 * i].slots)
        rest = whole[first:] if first < len(whole) else torch.zeros(1, dtype=torch.float64)
        log_probs += [whole[:first], rest]
    return replace(drawn, batches=pieces, log_probs=log_probs)
