"""Holds pass@1, or another mean, in a run: lambda from the windows of the realised change, put into its updates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from passk_guard.change import PASS_AT_1, ChangeEstimate, HeldCurve, MeanChange
from passk_guard.config import GuardConfig
from passk_guard.mitigation.gradient_guard import StepGuard
from passk_guard.mitigation.hold import HoldController, HoldMeasurement, HoldState, first_multiplier, part_of
from passk_guard.mitigation.objective import HeldAdvantages, PassKObjective
from passk_guard.probe.refresh import Refresh
from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import one_line


class HoldGuard:
    """Moves the multiplier of the installed objective, of advantages added to training's, or of p in the gradient.

    It moves only on completions that do not measure what follows: on a window that is over, and at the first refresh
    on the angle of every other prompt, whose change the first window leaves out. The controller sees what is held on
    the scale of its `HeldCurve`. What is shown is in its own units, lambda too: lambda A_f is added.

    Args:
        trainer: whose train() has begun.
        objective: installed on the trainer, if there is one.
        config: k, instruments, correct_threshold, hold_metric, hold_tolerance and hold_level.
        correct: the function that means *correct*.
        steps: changes the gradients of a trainer without advantages; None for one with advantages.

    Attributes:
        metric: name of the reward function that is held; None for pass@1.
        remark: what is added to what, where it is not the hold of a PassKObjective.
        steering: [m] bool, prompts of the newest refresh that are not measured; None where all are.
    """

    def __init__(
        self,
        trainer: Any,
        objective: PassKObjective | None,
        config: GuardConfig,
        correct: Any,
        steps: StepGuard | None = None,
    ) -> None:
        self.metric = None if config.hold_metric == PASS_AT_1 else config.hold_metric
        self.controller = HoldController(tolerance=0.0 if self.metric else config.hold_tolerance)
        self._config = config
        self.remark: str | None = None
        self.steering: torch.Tensor | None = None
        self._target: PassKObjective | HeldAdvantages | StepGuard
        self._by_gradient = steps is not None
        if steps is not None:
            if config.instruments != "both":
                raise GuardError(
                    f"Expected instruments='both' for mitigation='hold' on a {type(trainer).__name__}, which computes "
                    f"no advantages; found {config.instruments!r}. The direction that is added to its gradient comes "
                    "from the angle's samples."
                )
            self._target = steps
            self.remark = "lambda |g|/|p| p is added to the gradient g, since this trainer computes no advantages"
            return
        if self.metric is not None:
            self._target = self._added(trainer, list(trainer.reward_func_names).index(self.metric), None)
            self.remark = f"advantages of {one_line(self.metric)} are added to those of training"
            return
        if objective is not None:
            self._target = objective
            return
        column = held_column(trainer, correct)
        if column is None:
            raise GuardError(
                "Expected `correct` to be one of the trainer's reward functions for mitigation='hold' without a "
                "PassKObjective; found another. Pass the name of one, such as "
                f"{next(iter(trainer.reward_func_names))!r}, or use mitigation='project'."
            )
        self._target = self._added(trainer, column, config.correct_threshold)
        self.remark = (
            "pass@1 advantages are added to the trainer's own, since no PassKObjective of 0/1 rewards is installed"
        )

    @staticmethod
    def _added(trainer: Any, column: int, threshold: float | None) -> HeldAdvantages:
        HeldAdvantages.needs.check(trainer)
        return HeldAdvantages(trainer, column, threshold).install()

    def begin(self, refresh: Refresh | None) -> HoldState:
        """Lambda before the first window, from the angle where one was measured; the same on every rank."""
        if refresh is None or self.metric or self._by_gradient:  # the angle is of pass@k and pass@1
            return self.controller.begin()
        self.steering = torch.arange(refresh.num_samples.numel()) % 2 == 1
        steering = part_of(refresh.probe, self.steering[refresh.num_samples >= refresh.fewest])
        return self.controller.begin(first_multiplier(steering, self._config.k))

    def step(
        self, state: HoldState, held: HeldCurve, window: ChangeEstimate | MeanChange | None, steps: int
    ) -> HoldState:
        """Lambda after a window; None for one without an estimate."""
        if not held.scale:
            return self.controller.step(state, None)
        level = self._config.hold_level
        level = None if level is None else (level - held.low) / held.scale
        found = HoldMeasurement.of(held.curve, window, steps, level)
        if self.metric is None or found is None:
            return self.controller.step(state, found)
        accepted = self._config.hold_tolerance / held.scale  # may be above the 1 that a rate has at most
        state = self.controller.step(state, replace(found, above=found.above + accepted))
        return replace(state, cause=state.cause.replace(PASS_AT_1, one_line(self.metric)))

    def apply(self, state: HoldState | None, held: HeldCurve) -> None:
        """Train with this multiplier from here on."""
        self._target.hold = state.multiplier / held.scale if state is not None and held.scale else 0.0
        if isinstance(self._target, HeldAdvantages):
            self._target.unit = held.scale or 1.0

    def remove(self) -> None:
        """Leave objective and trainer as they were."""
        self._target.hold = 0.0
        if isinstance(self._target, HeldAdvantages):
            self._target.remove()

    def metrics(self, state: HoldState | None, held: HeldCurve) -> dict[str, float | None]:
        """Lambda for the next batches, its trusted part, and the held number less its level with the standard error.

        With `hold_metric` its fused level and its fused change since the start as well.
        """
        if state is None or not held.scale:
            return {}
        curve, scale, level = held.curve, held.scale, self._config.hold_level
        now = held.low + scale * curve.now
        above = (scale * curve.change, curve.change_se) if level is None else (now - level, curve.now_se)
        numbers: dict[str, float | None] = {
            "hold_multiplier": state.multiplier / scale,
            "hold_trusted": state.trusted / scale,
            **_with_error("hold_above_level", above[0], scale * above[1]),
        }
        if self.metric is not None:
            numbers |= _with_error("hold_metric_level", now, scale * curve.now_se)
            numbers |= _with_error("hold_metric_change", scale * curve.change, scale * curve.change_se)
        return numbers

    def action(self, state: HoldState | None, held: HeldCurve) -> str:
        """For a log line."""
        level, accepted = self._config.hold_level, self._config.hold_tolerance
        what = "its start" if level is None else f"{level:g}"
        less = f", less {accepted:g}" if accepted else ""
        lam = f" (lambda {state.multiplier / held.scale:.2f})" if state is not None and held.scale else ""
        return f"hold {one_line(held.name)} at {what}{less}{lam}"


def _with_error(name: str, value: float, error: float) -> dict[str, float | None]:
    """Both by name, None where the value is not known."""
    known = math.isfinite(error)
    return {name: value if known else None, f"{name}_se": error if known else None}


def makes_advantages(trainer: Any) -> bool:
    """Whether this trainer computes advantages, to which others may be added."""
    return hasattr(trainer, "_generate_and_score_completions")


def held_column(trainer: Any, correct: Any) -> int | None:
    """The reward of this trainer that means *correct*; None where it makes no advantages or has no such reward."""
    functions = list(getattr(trainer, "reward_funcs", ())) if makes_advantages(trainer) else []
    return functions.index(correct) if correct in functions else None
