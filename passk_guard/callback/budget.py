"""The probe's share of a run's work, counted in tokens, and the step at which the next refresh fits into it.

Work is counted by fixed weights, so that all ranks and a resumed run decide the same; the clock decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from passk_guard.config import GuardConfig
from passk_guard.probe.records import Rollouts
from passk_guard.sketch import TokenBatch
from passk_guard.utils.patching import Method, MethodPatch
from passk_guard.utils.ranks import Ranks

FORWARD = 1
"""Work of a token in a forward pass, the unit of all work."""

TRAINING = 3 * FORWARD
"""Of a token in a forward and backward pass."""

SAMPLING = 4 * FORWARD
"""Of a token that is sampled: a pass for it alone reads all weights once."""

MOST_PROMPTS, FEWEST_PROMPTS = 64, 16
"""Bounds of the size that a probe is given."""

FEWEST_REFRESHES = 8
"""A probe is made smaller where fewer refreshes than this would fit into a run."""

RETRY = 5
"""Steps from a failed refresh to the next, and between two where the work of training is unknown."""


@dataclass(frozen=True)
class Account:
    """The work of a run and of its probe so far, over all ranks; immutable, and plain enough for a checkpoint.

    Attributes:
        run: of training, its own sampling included.
        probe: of the guard.
        refreshes: tried so far.
        since: optimizer step at which the account begins.
        due: optimizer step before which no refresh is considered.
    """

    run: int = 0
    probe: int = 0
    refreshes: int = 0
    since: int = 0
    due: int = 0

    @property
    def share(self) -> float | None:
        """The probe's work over that of training; None before any training."""
        return self.probe / self.run if self.run else None

    @property
    def refresh(self) -> float:
        """Work of a refresh, on average."""
        return self.probe / max(1, self.refreshes)

    def with_work(self, run: int, probe: int) -> Account:
        """Add what was done since."""
        return replace(self, run=self.run + run, probe=self.probe + probe)

    def allows(self, step: int, overhead: float) -> bool:
        """Whether a refresh may begin: the work of the ones before is paid. The first one is paid afterwards."""
        return step >= self.due and (not self.run or self.probe <= overhead * self.run)

    def after_refresh(self, step: int, overhead: float, *, failed: bool) -> Account:
        """The account after a refresh that was tried at this step."""
        tried = replace(self, refreshes=self.refreshes + 1)
        return replace(tried, due=step + RETRY) if failed else tried.planned(step, overhead)

    def planned(self, step: int, overhead: float) -> Account:
        """The same with the step at which what was spent is paid, as training goes so far."""
        trained = step - self.since
        if not self.run:
            return replace(self, due=step + (1 if trained == 0 else RETRY))
        missing = self.probe / overhead - self.run
        return replace(self, due=step + max(1, math.ceil(missing * trained / self.run)))

    def cadence(self, step: int, overhead: float) -> int | None:
        """Steps between two refreshes in the long run; None before any training."""
        trained = step - self.since
        return max(1, round(self.refresh / overhead * trained / self.run)) if self.run and trained else None


class Meter:
    """Counts on this rank what is not in the account yet.

    Args:
        trainer: a transformers Trainer. The tokens of its batches are read where it computes its loss.
    """

    def __init__(self, trainer: Any) -> None:
        self.run = self.probe = 0
        self._trainer = trainer
        self._patch = MethodPatch(trainer, "compute_loss", self._counting, owner="passk_guard.meter")

    def install(self) -> None:
        """Count from here on."""
        self.run = self.probe = 0
        self._patch.install()

    def remove(self) -> None:
        """Give the trainer its method back."""
        self._patch.remove()

    def charge_sampling(self, rollouts: Rollouts) -> None:
        """Add the work of these samples, which a refresh that fails afterwards has taken too."""
        # In a batch of a training step all completions are as long as the longest, too.
        width = max(map(len, rollouts.completion_ids), default=0)
        self.probe += FORWARD * sum(map(len, rollouts.prompt_ids)) + SAMPLING * width * len(rollouts)

    def charge(self, trained: int, scored: int) -> None:
        """Add tokens of a refresh on this rank, in forward and backward passes and in forward passes alone."""
        self.probe += TRAINING * trained + FORWARD * scored

    def settle(self, account: Account, ranks: Ranks, *, failed: bool = False) -> tuple[Account, int]:
        """The account with the work of all ranks, and on how many a refresh failed. Every rank calls this."""
        found = ranks.sum(torch.tensor([self.run, self.probe, int(failed)]))
        self.run = self.probe = 0
        run, probe, failures = found.tolist()
        return account.with_work(run, probe), failures

    def _counting(self, compute_loss: Method) -> Method:
        def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(model, "training", False):
                self.run += training_work(self._trainer, inputs)
            return compute_loss(model, inputs, *args, **kwargs)

        return counted


def training_work(trainer: Any, inputs: Any) -> int:
    """Work of one batch of training: its passes, and for TRL's trainers a share of its sampling.

    Args:
        inputs: of `compute_loss`. A batch of another form counts as none.
    """
    if not isinstance(inputs, Mapping):
        return 0
    if "completion_ids" not in inputs:
        return TRAINING * _size(inputs.get("input_ids"))
    prompts, completions = _size(inputs.get("prompt_ids")), _size(inputs["completion_ids"])
    both = prompts + completions
    reference = FORWARD * both if getattr(trainer, "beta", 0) else 0
    once = FORWARD * prompts + SAMPLING * completions + reference
    return TRAINING * both + once // max(1, getattr(trainer, "num_iterations", 1))


def tokens_of(batches: Iterable[TokenBatch]) -> int:
    """Tokens of these passes, padding included."""
    return sum(batch.input_ids.numel() for batch in batches)


def sized_by_budget(config: GuardConfig) -> bool:
    """Whether the size of a refresh follows from the length of the run, which is known when training begins."""
    return config.probe_prompts is None and config.refresh_steps is None


def probe_size(trainer: Any, config: GuardConfig, steps: int) -> int:
    """Prompts of a refresh: as set, or as many as leave room for `FEWEST_REFRESHES` in the run, within bounds.

    Completions of the probe are taken to be as long as those of training: their lengths are not known yet.

    Args:
        steps: optimizer steps of the whole run.
    """
    if not sized_by_budget(config):
        return config.probe_prompts or MOST_PROMPTS
    size = MOST_PROMPTS
    while size > FEWEST_PROMPTS and refreshes_that_fit(trainer, config, steps, size) < FEWEST_REFRESHES:
        size //= 2
    return size


def refreshes_that_fit(trainer: Any, config: GuardConfig, steps: int, size: int) -> float:
    """About how many refreshes of so many prompts the budget of the run has room for."""
    args = trainer.args
    examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * steps
    sampled = SAMPLING / max(1, trainer.num_iterations) if hasattr(trainer, "num_iterations") else 0
    each = SAMPLING + TRAINING + 2 * FORWARD
    return config.overhead * examples * (sampled + TRAINING) / (size * config.num_samples * each)


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else 0
