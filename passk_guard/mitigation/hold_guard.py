"""Holds pass@1 in a run: lambda from the windows of the realised change, put into the advantages of the trainer."""

from __future__ import annotations

from typing import Any

import torch

from passk_guard.change import ChangeEstimate, FusedCurve
from passk_guard.config import GuardConfig
from passk_guard.mitigation.hold import HoldController, HoldMeasurement, HoldState, first_multiplier, part_of
from passk_guard.mitigation.objective import HeldAdvantages, PassKObjective
from passk_guard.probe.refresh import Refresh
from passk_guard.utils.errors import GuardError


class HoldGuard:
    """Moves the multiplier of the installed objective, or of pass@1 advantages added to the trainer's own.

    It moves only on completions that do not measure what follows: on a window that is over, and at the first refresh
    on the angle of every other prompt, whose change the first window leaves out.

    Args:
        trainer: GRPOTrainer or RLOOTrainer.
        objective: installed on the trainer, if there is one.
        config: k, correct_threshold, hold_tolerance and hold_level.
        correct: the function that means *correct*.

    Attributes:
        remark: what the advantages are added to, where no objective is installed.
        steering: [m] bool, prompts of the newest refresh that are not measured; None where all are.
    """

    def __init__(self, trainer: Any, objective: PassKObjective | None, config: GuardConfig, correct: Any) -> None:
        self.controller = HoldController(tolerance=config.hold_tolerance)
        self._config = config
        self.remark: str | None = None
        self.steering: torch.Tensor | None = None
        self._target: PassKObjective | HeldAdvantages
        if objective is not None:
            self._target = objective
            return
        column = held_column(trainer, correct)
        if column is None:
            raise GuardError(_nothing_to_hold(trainer))
        HeldAdvantages.needs.check(trainer)
        self._target = HeldAdvantages(trainer, column, config.correct_threshold).install()
        self.remark = (
            "pass@1 advantages are added to the trainer's own, since no PassKObjective of 0/1 rewards is installed"
        )

    def begin(self, refresh: Refresh | None) -> HoldState:
        """Lambda before the first window, from the angle where one was measured; the same on every rank."""
        if refresh is None:
            return self.controller.begin()
        self.steering = torch.arange(refresh.num_samples.numel()) % 2 == 1
        steering = part_of(refresh.probe, self.steering[refresh.num_samples >= refresh.fewest])
        return self.controller.begin(first_multiplier(steering, self._config.k))

    def step(self, state: HoldState, fused: FusedCurve, window: ChangeEstimate | None, steps: int) -> HoldState:
        """Lambda after a window; None for one without an estimate."""
        return self.controller.step(state, HoldMeasurement.of(fused, window, steps, self._config.hold_level))

    def apply(self, state: HoldState | None) -> None:
        """Compute advantages with this multiplier from here on."""
        self._target.hold = 0.0 if state is None else state.multiplier

    def remove(self) -> None:
        """Leave objective and trainer as they were."""
        self._target.hold = 0.0
        if isinstance(self._target, HeldAdvantages):
            self._target.remove()

    def metrics(self, state: HoldState | None, fused: FusedCurve) -> dict[str, float | None]:
        """Lambda for the next batches, its trusted part, and pass@1 less its level with the standard error."""
        if state is None:
            return {}
        level = self._config.hold_level
        above = (fused.change, fused.change_se) if level is None else (fused.now - level, fused.now_se)
        known = above[1] < float("inf")
        return {
            "hold_multiplier": state.multiplier,
            "hold_trusted": state.trusted,
            "hold_above_level": above[0] if known else None,
            "hold_above_level_se": above[1] if known else None,
        }

    def action(self, state: HoldState | None) -> str:
        """For a log line."""
        level, accepted = self._config.hold_level, self._config.hold_tolerance
        what = "its start" if level is None else f"{level:g}"
        less = f", less {accepted:g}" if accepted else ""
        return f"hold pass@1 at {what}{less}" + ("" if state is None else f" (lambda {state.multiplier:.2f})")


def held_column(trainer: Any, correct: Any) -> int | None:
    """The reward of this trainer that means *correct*; None where it makes no advantages or has no such reward."""
    if not hasattr(trainer, "_generate_and_score_completions"):
        return None
    functions = list(getattr(trainer, "reward_funcs", ()))
    return functions.index(correct) if correct in functions else None


def _nothing_to_hold(trainer: Any) -> str:
    if not hasattr(trainer, "_generate_and_score_completions"):
        return (
            f"Expected a GRPOTrainer or RLOOTrainer for mitigation='hold'; found {type(trainer).__name__}, which "
            "computes no advantages. Use mitigation='project', which needs none."
        )
    return (
        "Expected `correct` to be one of the trainer's reward functions for mitigation='hold' without a "
        f"PassKObjective; found another. Pass the name of one, such as {next(iter(trainer.reward_func_names))!r}, or "
        "use mitigation='project'."
    )
