"""Train on pass@k with TRL, which has no such objective: replace an existing trainer's advantages by pass@k ones."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from passk_guard.passk.closed_forms import passk_advantages
from passk_guard.passk.max_at_k import max_at_k_advantages
from passk_guard.probe.samplers import BatchTap
from passk_guard.utils.errors import GuardError
from passk_guard.utils.patching import MethodPatch
from passk_guard.utils.private_api import is_trl

logger = logging.getLogger(__name__)

_INSTALLED = "_passk_guard_objective"


class _Advantages(ABC):
    """Patches a TRL trainer where its advantages are made.

    Args:
        trainer: GRPOTrainer or RLOOTrainer.
        column: of the reward function that means *correct*.

    Attributes:
        keeps: what the trainer's own advantages are multiplied by before these are added; 0 to replace them.
    """

    needs = BatchTap.needs
    keeps = 0.0

    def __init__(self, trainer: Any, column: int) -> None:
        self._trainer, self._column = trainer, column
        self._rewards: Tensor | None = None
        owner = type(self).__name__
        self._patches = [
            MethodPatch(trainer, "_calculate_rewards", self._keep_rewards, owner=owner),
            MethodPatch(trainer, "_generate_and_score_completions", self._change_advantages, owner=owner),
        ]

    @abstractmethod
    def advantages(self, rewards: Tensor, num_generations: int) -> Tensor:
        """[B] of a batch; rewards [B] of the column, groups of `num_generations` in a row; NaN: none."""

    def remove(self) -> None:
        """Give the trainer its advantages back."""
        for patch in self._patches:
            patch.remove()

    def _install(self) -> None:
        for patch in self._patches:
            patch.install()

    def _keep_rewards(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def calculate_rewards(*args: Any, **kwargs: Any) -> Tensor:
            rewards = original(*args, **kwargs)
            self._rewards = rewards[:, self._column].detach()  # gathered: all ranks, in order
            return rewards

        return calculate_rewards

    def _change_advantages(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def generate_and_score(inputs: Any) -> Any:
            output = original(inputs)
            if not self._trainer.model.training or self._rewards is None:
                return output
            everyone = self.advantages(self._rewards, self._trainer.num_generations)
            local = output["advantages"]
            start = self._trainer.accelerator.process_index * local.shape[0]
            mine = everyone[start : start + local.shape[0]].to(local)
            output["advantages"] = self.keeps * local + mine if self.keeps else mine
            _correct_completion_log(self._trainer, everyone, keeps=self.keeps)
            return output

        return generate_and_score


class HeldAdvantages(_Advantages):
    r"""Adds $\lambda A_1$ to the advantages of a TRL trainer, whatever they are.

    For a reward f that is not 0/1, `threshold=None`, it adds $\lambda A_f$: f less its mean over the other completions
    of the prompt. The sum is divided by $\lambda$ times the range of f where that is above 1: a large $\lambda$ turns
    the step and does not make it longer.

    Args:
        trainer: GRPOTrainer or RLOOTrainer.
        column: of the reward function that means *correct*, or of f.
        threshold: rewards at or above it count as correct; None takes them as they are.

    Attributes:
        hold: lambda, 0 at first.
        unit: the range of f.
    """

    def __init__(self, trainer: Any, column: int, threshold: float | None) -> None:
        super().__init__(trainer, column)
        self.threshold, self.hold, self.unit = threshold, 0.0, 1.0

    @property
    def keeps(self) -> float:  # type: ignore[override]
        return 1 / max(1.0, self.hold * self.unit)

    def install(self) -> HeldAdvantages:
        """Add to the advantages from here on."""
        self._install()
        return self

    def advantages(self, rewards: Tensor, num_generations: int) -> Tensor:
        """[B] float32 lambda A_1, or lambda A_f, of a batch, times `keeps`; 0 where there is no reward."""
        grouped, factor = rewards.view(-1, num_generations), self.keeps * self.hold
        if self.threshold is None:
            return factor * max_at_k_advantages(grouped, 1, mask=grouped.isfinite()).view(-1)
        right = (grouped >= self.threshold).float()
        return factor * passk_advantages(right, 1, mask=~torch.isnan(grouped)).view(-1)


class PassKObjective(_Advantages):
    r"""Replaces the advantages of a TRL GRPOTrainer or RLOOTrainer by pass@k advantages.

    Each completion gets $A_i = f(W_i)(r_i - b_i)$ of `passk_advantages`: leave-one-out weight and baseline over the
    completions of its prompt, so the policy gradient is an unbiased estimate of grad J_k (arXiv 2602.21189, Sec. 3).
    A pass@k *reward function* is not the same: the trainer's baseline biases its weights, and dividing by the group's
    standard deviation cancels them. A completion without a reward (None) gets advantage 0, as does a whole group with
    fewer than k rewards. Evaluation is unchanged.

    With `threshold=None` rewards are taken as they are, partial credit included, and the objective is max@k, the
    expected best reward of k samples (`max_at_k_advantages`; PKPO, arXiv 2505.15201). The guard still watches pass@k,
    of the rewards from its `correct_threshold` on. There is no floor to move: use mitigation="hold" or "project".

    Use as a context manager around `trainer.train()`, or `install()` and `remove()`.

    Args:
        trainer: GRPOTrainer or RLOOTrainer.
        k: 1 <= k <= trainer.num_generations; k = 1 is RLOO.
        correct: name of the reward function that means *correct*; may be left out when there is only one.
        threshold: rewards at or above it count as correct; None for rewards that are not 0/1.
        floor, cap: clip the prompt weight to [floor, cap]; may be changed between steps. A cap alone logs a warning.
            Not with `threshold=None`: max@k has no prompt weight.

    Attributes:
        hold: multiplier of the pass@1 advantages that are added, 0 at first; `mitigation="hold"` moves it. Not with
            `threshold=None`, whose advantages it adds to as to any others (`HeldAdvantages`).

    Raises:
        GuardError: the trainer computes no advantages, num_generations < k, the reward function is unknown or not
            named where there are several, bounds without a threshold, or settings that would rescale the advantages:
            `scale_rewards` other than "none" (GRPO) or `normalize_advantages` (RLOO).
    """

    def __init__(
        self,
        trainer: Any,
        k: int,
        *,
        correct: str | None = None,
        threshold: float | None = 1.0,
        floor: float | None = None,
        cap: float | None = None,
    ) -> None:
        _check_trainer(trainer, k)
        _check_bounds(floor, cap, threshold)
        self.k, self.threshold, self.floor, self.cap, self.hold = k, threshold, floor, cap, 0.0
        super().__init__(trainer, _reward_column(trainer, correct))

    @property
    def correct(self) -> Callable[..., Any]:
        """The reward function that means correct."""
        function: Callable[..., Any] = self._trainer.reward_funcs[self._column]
        return function

    def install(self) -> PassKObjective:
        """Take over the advantages. Raises GuardError when the trainer has a pass@k objective already."""
        for callback in self._trainer.callback_handler.callbacks:
            if getattr(callback, "waits", False) is True:  # a guard in `callbacks=[...]`, which nobody told its trainer
                callback.bind(self._trainer)
        self._install()
        setattr(self._trainer, _INSTALLED, self)
        return self

    def remove(self) -> None:
        """Give the trainer its advantages back."""
        super().remove()
        if self.of(self._trainer) is self:
            delattr(self._trainer, _INSTALLED)

    @staticmethod
    def of(trainer: Any) -> PassKObjective | None:
        """The objective that is installed on this trainer, if there is one."""
        return getattr(trainer, _INSTALLED, None)

    def __enter__(self) -> PassKObjective:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.remove()

    def advantages(self, rewards: Tensor, num_generations: int) -> Tensor:
        """Pass@k advantages of a batch.

        Args:
            rewards: [B] of the reward function that means correct, groups of `num_generations` in a row; NaN: none.
            num_generations: completions of each prompt.

        Returns:
            [B] float32.
        """
        grouped = rewards.view(-1, num_generations)
        scored = ~torch.isnan(grouped) if self.threshold is not None else grouped.isfinite()
        # A group with fewer than k rewards has no unbiased estimate and must not stop the run.
        scored &= scored.sum(1, keepdim=True) >= self.k
        if self.threshold is None:
            return max_at_k_advantages(grouped, self.k, mask=scored).view(-1)
        right = (grouped >= self.threshold) & scored
        bounds = {"floor": self.floor, "cap": self.cap}
        return passk_advantages(right.float(), self.k, mask=scored, hold=self.hold, **bounds).view(-1)


def too_few_samples(name: str, k: int) -> str:
    """A warning where a setting of this name makes n = k samples of each prompt."""
    return (
        f"passk_guard: {name}={k} is k itself. A pass@{k} weight of {k} samples is non-zero only where exactly one of "
        f"them is right, so that most prompts count for nothing. Use {name}={2 * k}."
    )


def _correct_completion_log(trainer: Any, advantages: Tensor, *, keeps: float) -> None:
    """Show the advantages that are used in the table of completions, where TRL has put its own by now."""
    log = getattr(trainer, "_logs", {}).get("advantages")
    if log is None or len(log) < advantages.numel():
        return
    own = [log.pop() for _ in range(advantages.numel())][::-1]
    mine = advantages.tolist()
    log.extend([keeps * a + b for a, b in zip(own, mine, strict=True)] if keeps else mine)


def _check_bounds(floor: float | None, cap: float | None, threshold: float | None) -> None:
    if threshold is None and (floor is not None or cap is not None):
        raise GuardError(
            f"Expected no bounds with threshold=None; found floor={floor}, cap={cap}. They clip a prompt's weight, and "
            "max@k has none: leave them out, or give the reward from which a completion counts as correct."
        )
    if (floor is not None and floor < 0) or (cap is not None and cap <= 0):
        raise GuardError(f"Expected `floor` >= 0 and `cap` > 0; found floor={floor}, cap={cap}.")
    if floor is not None and cap is not None and floor > cap:
        raise GuardError(f"Expected `floor` <= `cap`; found floor={floor}, cap={cap}.")
    if cap is not None and not floor:
        logger.warning(
            "A cap of %g on the prompt weight does not protect pass@1: easy prompts keep weights near 0, which only a "
            "floor lifts. Measured over 60 steps of the demo's task: pass@1 0.605 -> 0.466 with a cap of 2, 0.460 "
            "without, 0.615 with a floor of 0.5. Pass `floor`.",
            cap,
        )


def _check_trainer(trainer: Any, k: int) -> None:
    if is_trl(trainer):
        PassKObjective.needs.check(trainer)
    if not hasattr(trainer, "_generate_and_score_completions"):
        raise GuardError(
            f"Expected a TRL GRPOTrainer or RLOOTrainer; found {type(trainer).__name__}, which computes no advantages."
        )
    if not 1 <= k <= trainer.num_generations:
        raise GuardError(
            f"Expected 1 <= k <= num_generations; found k={k}, num_generations={trainer.num_generations}. "
            "No unbiased pass@k gradient exists above it: raise `num_generations` or lower `k`."
        )
    if 1 < k == trainer.num_generations:
        logger.warning("%s", too_few_samples("num_generations", k))
    args = trainer.args
    scaling = getattr(args, "scale_rewards", "none")
    if scaling not in ("none", False):
        raise GuardError(
            f"Expected scale_rewards='none'; found {scaling!r}. Dividing by a standard deviation cancels the prompt "
            "weights that make the objective pass@k, so it would be ignored here: set it to 'none'."
        )
    if getattr(args, "normalize_advantages", False):
        raise GuardError("Expected normalize_advantages=False; found True, which would rescale the pass@k weights.")
    if getattr(args, "loss_type", "dr_grpo") in ("grpo", "sapo"):
        logger.warning(
            "loss_type=%r divides each completion's loss by its length, so long completions count less than in grad "
            "J_k. Use loss_type='dr_grpo' unless all completions have the same length.",
            args.loss_type,
        )


def _reward_column(trainer: Any, correct: str | None) -> int:
    names = list(trainer.reward_func_names)
    if correct is None and len(names) == 1:
        return 0
    if correct not in names:
        found = "none was named" if correct is None else f"found {correct!r}"
        raise GuardError(f"Expected `correct` to name the reward function that means correct, one of {names}; {found}.")
    return names.index(correct)
