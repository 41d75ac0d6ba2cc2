"""One refresh: rollouts -> correct or not -> sketched score sums -> Gram matrix, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from passk_guard.estimation.records import ProbeGram
from passk_guard.probe.out_of_memory import largest, until_it_fits
from passk_guard.probe.passes import SharedPrompts, shared_batches
from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.probe.score_sums import add_scores_, gram_matrix, sum_over_ranks_
from passk_guard.sketch import ScoreSketcher, TokenBatch, filler_batch
from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.ranks import Ranks


@dataclass(frozen=True)
class Refresh:
    """What one refresh found, and what another pass over its samples needs.

    Attributes:
        probe: the Gram matrix of the prompts with at least `fewest` verdicts, the same on every rank.
        remark: what was left out and why, and what exceeded `max_tokens`; None for nothing.
        batches: this rank's samples of prompts that have a gradient; slot x or m + x as in the Gram matrix of all
            m prompts. Every rank has equally many.
        log_probs: [B] float64 log pi(y_i | x_i) of the samples of each batch, where the refresher keeps them. Of
            samples that came with their own (`Rollouts.log_probs`), those.
        num_samples, num_correct: [m] verdicts of all prompts, over all ranks.
        fewest: prompts with fewer verdicts are left out.
        temperature: of the sampling.
        unscored: whether the samples are of something else than the model, and `reuse.reweigh` is to make the Gram
            matrix: there is none yet.
    """

    probe: ProbeGram
    remark: str | None
    batches: list[TokenBatch]
    num_samples: Tensor
    num_correct: Tensor
    fewest: int
    temperature: float
    log_probs: Sequence[Tensor] = ()
    unscored: bool = False


@dataclass(frozen=True)
class Refresher:
    """Turn the rollouts of all ranks into one Gram matrix, the same on each.

    Attributes:
        sketcher: projects score vectors.
        ranks: the processes of the run.
        k: prompts with fewer than k verdicts are left out.
        max_tokens: of one forward and backward pass, padding included; a longer sample gets a separate one.
        pad_token_id: for the batches of the sketch.
        autocast: makes the context the forward passes run in, as training does.
        sample_fewer: called when memory runs out in sampling, see `Sampler`.
        on_less_memory: called with the `max_tokens` of the next attempt when memory ran out in a pass.
        keeps_log_probs: whether a refresh holds them, for a later one to reweight its samples.
        shared: whether the samples of a prompt with the same outcome may stand behind one copy of it; None: they do
            not. Nor where `keeps_log_probs`: each sample is then reweighted by itself.
    """

    sketcher: ScoreSketcher
    ranks: Ranks
    k: int
    max_tokens: int
    pad_token_id: int
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    sample_fewer: Callable[[], bool] = lambda: False
    on_less_memory: Callable[[int], None] = lambda tokens: None
    keeps_log_probs: bool = False
    shared: SharedPrompts | None = None

    def run(self, sample: Callable[[], tuple[Rollouts, Outcomes]], keys: Sequence[Hashable], seed: int) -> Refresh:
        """Run all stages. Every rank calls this, and every rank gets the same Gram matrix or the same FailedRefresh.

        Where memory runs out on a rank, all ranks try again with half of it, as long as there is a smaller piece.

        Args:
            sample: returns this rank's rollouts and their outcomes.
            keys: identities of the prompts over all ranks, or none.
            seed: of the projections, new for each refresh so that pooling averages the sketch's error out.

        Raises:
            FailedRefresh: a stage failed on some rank, too few prompts have k verdicts, or a score is not finite.
        """
        rollouts, outcomes = until_it_fits(self.ranks, lambda: self.ranks.together(sample), self.sample_fewer)
        num_samples, num_correct = count_verdicts(rollouts, outcomes, self.ranks)
        failures = int(self.ranks.sum(torch.tensor([outcomes.failures]))[0])
        kept = (num_samples >= self.k).nonzero().squeeze(1)
        remark = _remark(outcomes, failures, num_correct, dropped=num_samples.numel() - kept.numel(), k=self.k)
        if kept.numel() == 0:
            raise FailedRefresh(f"no prompt has {self.k} samples with a verdict; {remark}")
        mixed = (num_samples >= self.k) & (num_correct > 0) & (num_correct < num_samples)
        slots = _slots(rollouts, outcomes, mixed)
        unscored = self.ranks.max(int(rollouts.log_probs is not None)) > 0 and bool(mixed.any())
        if unscored:
            batches, log_probs = self._unscored(rollouts, slots)
            gram = torch.empty(0, 0, dtype=torch.float64)
        else:
            batches, log_probs, sums = self._sketched(rollouts, slots, seed)
            gram = self.gram(sums, kept)
            if not bool(torch.stack(gram.aminmax()).isfinite().all()):  # NaN comes through
                raise FailedRefresh("the inner products of the score vectors are not finite")
        names = [keys[i] for i in kept.tolist()] if len(keys) else ()
        return Refresh(
            probe=ProbeGram(gram, num_samples[kept], num_correct[kept], names),
            remark="; ".join(filter(None, [remark, self._too_long(batches)])) or None,
            batches=batches,
            num_samples=num_samples,
            num_correct=num_correct,
            fewest=self.k,
            temperature=rollouts.temperature,
            log_probs=log_probs if self.keeps_log_probs or unscored else (),
            unscored=unscored,
        )

    def _unscored(self, rollouts: Rollouts, slots: Tensor) -> tuple[list[TokenBatch], list[Tensor]]:
        """The batches and the log-probabilities that came with their samples. Each has a row of its own: a ratio."""
        given = torch.tensor(list(rollouts.log_probs or ()) or [0.0], dtype=torch.float64)
        places = torch.where(slots >= 0, torch.arange(len(slots)), -1)
        batches, log_probs = list[TokenBatch](), list[Tensor]()
        for batch in shared_batches(self.ranks, rollouts, places, self.max_tokens, self.pad_token_id):
            place = batch.slots.cpu()
            own = torch.where(place >= 0, slots[place.clamp(min=0)], -1)
            batches.append(replace(batch, slots=own.to(batch.slots.device)))
            log_probs.append(torch.where(place >= 0, given[place.clamp(min=0)], 0.0))
        return batches, log_probs

    def gram(self, sums: Tensor, kept: Tensor) -> Tensor:
        """Inner products of S+ and S- [2m, dim] of the prompts kept, the same on every rank."""
        rows = torch.cat([kept, kept + len(sums) // 2])
        return self.ranks.from_first(self.ranks.together(lambda: gram_matrix(sums, rows)))

    def _sketched(self, rollouts: Rollouts, slots: Tensor, seed: int) -> tuple[list[TokenBatch], list[Tensor], Tensor]:
        """The batches that fitted into memory, their log-probabilities, and their sums as of `score_sums`."""
        tokens, batches, log_probs = self.max_tokens, list[TokenBatch](), list[Tensor]()
        shared = None if self.keeps_log_probs else self.shared

        def add(total: Tensor, i: int) -> Tensor:
            out = log_probs[i] if self.keeps_log_probs else None
            return add_scores_(total, self.sketcher, batches[i], rollouts.temperature, out)

        def attempt() -> Tensor:
            batches[:] = shared_batches(self.ranks, rollouts, slots, tokens, self.pad_token_id, shared, slots)
            log_probs[:] = [torch.zeros(len(batch.slots), dtype=torch.float64) for batch in batches]
            return self.score_sums(len(batches), add, 2 * rollouts.num_prompts, seed)

        def smaller() -> bool:
            nonlocal tokens
            most, samples = largest(self.ranks, batches)
            if samples <= 1:
                return False
            tokens = min(tokens, most) // 2
            self.on_less_memory(tokens)
            return True

        sums = until_it_fits(self.ranks, attempt, smaller)
        return batches, log_probs, sums

    def _too_long(self, batches: list[TokenBatch]) -> str | None:
        """A remark on the longest sample of any rank that is above `max_tokens`, if there is one."""
        longest = self.ranks.max(max((batch.input_ids.numel() for batch in batches), default=0))
        if longest <= self.max_tokens:
            return None
        return f"a sample of {longest} tokens, above max_probe_tokens={self.max_tokens}, had a separate pass"

    def score_sums(self, passes: int, add: Callable[[Tensor, int], Tensor], num_slots: int, seed: int) -> Tensor:
        """[2m, dim] sketched sums S+ and S- over the samples of all ranks; `add(total, i)` adds those of pass i.

        Raises:
            FailedRefresh: on all ranks, when a pass failed on one.
        """
        self.sketcher.reseed(seed)
        total = torch.zeros(num_slots, self.sketcher.dim, device=self.ranks.device)

        def plus(before: Tensor, i: int) -> Tensor:
            try:
                with self.autocast():
                    return add(before, i)
            except FailedRefresh:  # of the numbers that the pass has brought: it is over on all ranks
                raise
            except Exception:
                if self.ranks.count > 1:  # where weights are sharded, the others wait in this pass
                    filler = filler_batch(pad_token_id=self.pad_token_id, device=self.ranks.device)
                    with self.autocast():
                        add_scores_(before.new_zeros(1, before.shape[1]), self.sketcher, filler, temperature=1.0)
                raise

        for i in range(passes):  # all ranks agree after each pass: one alone would wait for weights of the others
            total = self.ranks.together(partial(plus, total, i))
        return sum_over_ranks_(total, self.ranks)


def count_verdicts(rollouts: Rollouts, outcomes: Outcomes, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """[m] samples with a verdict and [m] correct ones, over all ranks."""
    index = torch.tensor(rollouts.prompt_index, dtype=torch.int64)
    counts = torch.zeros(2, rollouts.num_prompts, dtype=torch.int64)
    verdict = (outcomes.correct >= 0) & (index >= 0)
    counts[0].index_add_(0, index[verdict], torch.ones_like(index[verdict]))
    counts[1].index_add_(0, index[verdict], outcomes.correct[verdict].to(torch.int64))
    counts = ranks.sum(counts)
    return counts[0], counts[1]


def _slots(rollouts: Rollouts, outcomes: Outcomes, mixed: Tensor) -> Tensor:
    """[B] row of the score sums of each sample: x if it is right, m + x if wrong; -1 if it is not needed.

    A prompt whose samples are all right or all wrong has zero gradient estimates, so its backward is skipped.
    """
    index = torch.tensor(rollouts.prompt_index, dtype=torch.int64)
    row = torch.where(outcomes.correct == 1, index, index + rollouts.num_prompts)
    matters = (outcomes.correct >= 0) & (index >= 0) & mixed[index.clamp(min=0)]
    return torch.where(matters, row, -1)


def _remark(outcomes: Outcomes, failures: int, num_correct: Tensor, *, dropped: int, k: int) -> str | None:
    parts = []
    if failures:
        cause = f" ({outcomes.reason})" if outcomes.reason else ""
        parts.append(f"{failures} samples have no reward{cause}")
    if dropped:
        parts.append(f"{dropped} prompts had fewer than {k} samples with a verdict")
    if not bool(num_correct.any()) and outcomes.best_reward is not None:
        parts.append(f"no sample counts as correct; the largest reward seen is {outcomes.best_reward:g}")
    return "; ".join(parts) or None
