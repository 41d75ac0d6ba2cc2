"""What the guard does about a conflict: it holds pass@1, moves the floor, projects the gradient, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from passk_guard.callback.realised import WindowResult
from passk_guard.callback.state import Memory
from passk_guard.config import GuardConfig
from passk_guard.estimation.estimate import in_conflict
from passk_guard.estimation.records import ConflictEstimate
from passk_guard.mitigation import FloorState
from passk_guard.mitigation.engines import choose_engine
from passk_guard.mitigation.floor_guard import FloorGuard, choose_mitigation, installed_objective
from passk_guard.mitigation.gradient_guard import StepGuard
from passk_guard.mitigation.hold_guard import HoldGuard, held_column, makes_advantages
from passk_guard.mitigation.protected_direction import direction_noise, pass1_loss
from passk_guard.probe.refresh import Refresh
from passk_guard.utils.isolation import without_dropout
from passk_guard.utils.ranks import Ranks

MEASURED_OF = 4
"""Where `project` takes its direction from the probe, one prompt in so many is measured and the others steer."""


class NoMitigation:
    """Does nothing: what a guard has outside train().

    Attributes:
        bound: whether it belongs to a train().
        remark: how "auto" was decided, if it was, and what is done beyond the plain case.
        steps: projects gradients before optimizer steps; None where nothing does.
        floor: moves the floor of the objective; None where nothing does.
        hold: moves the multiplier of the pass@1 advantages; None where nothing does.
    """

    bound: bool = False
    remark: str | None = None
    steps: StepGuard | None = None
    floor: FloorGuard | None = None
    hold: HoldGuard | None = None

    def resume(self, checkpoint: Path, memory: Memory) -> None:
        """Go on from a checkpoint, and warn of what was lost."""

    def react(self, refresh: Refresh, estimate: ConflictEstimate, memory: Memory) -> Memory:
        """Solve for the floor, open or close the gate, and behind an open one take a new direction to protect.

        Raises:
            FailedRefresh: the direction could not be taken; the same on every rank.
        """
        return memory

    def follow(self, memory: Memory, window: WindowResult | None) -> Memory:
        """Move the multiplier after fresh samples; `window` is the one that they end, None where none was open."""
        return memory

    def missed(self, memory: Memory) -> Memory:
        """The memory after a failed refresh, which has failed on every rank."""
        return memory

    def measured(self, count: int) -> torch.Tensor:
        """[count] bool: the prompts of a sample whose change is measured; all, where none steers the updates.

        Completions that steer the updates between two scores are not a fair sample of what the updates did.
        """
        return torch.ones(count, dtype=torch.bool)

    def apply(self, memory: Memory) -> None:
        """Put the floor in force for the batches to come; at a step boundary, so that no batch sets its own."""

    def leave_unguarded(self) -> None:
        """After a failed refresh: no step is projected on an old direction; the floor stays where it was."""

    def refresh_metrics(self, memory: Memory) -> dict[str, float | None]:
        """Numbers that change with a refresh."""
        return {}

    def step_metrics(self) -> dict[str, float | None]:
        """Numbers of the steps since the last call."""
        return {}

    def save(self, checkpoint: Path) -> None:
        """Write this rank's share of what does not fit into the guard's memory."""

    def remove(self) -> None:
        """Leave trainer and objective as they were."""

    def action(self, memory: Memory) -> str:
        """For a log line: what is done from this refresh on."""
        return "observe"


class Mitigator(NoMitigation):
    """The mitigation of one train(), as the config asks for it.

    Args:
        trainer: whose train() has begun.
        config: mitigation and its settings.
        ranks: the processes of the run.
        warn: called once with each reason why something no longer works.
        wanted: called before each step: whether the guard still is on the trainer.
        correct: the function that means *correct*.

    Raises:
        GuardError: a mitigation this trainer, its engine or its objective does not allow, and what to do.
    """

    bound = True

    def __init__(
        self,
        trainer: Any,
        config: GuardConfig,
        ranks: Ranks,
        warn: Callable[[str], None],
        wanted: Callable[[], bool] = lambda: True,
        correct: Any = None,
    ) -> None:
        self._trainer, self._config, self._ranks, self._warn = trainer, config, ranks, warn
        reweights = config.mitigation in ("hold", "reweight", "both", "auto")
        objective = installed_objective(trainer, config.k) if reweights else None
        holds = self._measures and (objective is not None or held_column(trainer, correct) is not None)
        chosen, self.remark = choose_mitigation(config.mitigation, objective, config.source, holds=holds)
        if chosen in ("project", "both") or (chosen == "hold" and not makes_advantages(trainer)):
            self.steps = StepGuard(
                choose_engine(trainer),
                ranks,
                gamma=config.gamma,
                average=config.advanced.protected_average,
                dtype=getattr(torch, config.protected_dtype),
                on_failure=warn,
                wanted=wanted,
            )
        if chosen == "hold":
            self.hold = HoldGuard(trainer, objective, config, correct, self.steps)
            self.remark = "; ".join(filter(None, (self.remark, self.hold.remark))) or None
        if chosen in ("reweight", "both") and objective is not None:
            self.floor = FloorGuard(objective, config, ranks)
        if self.steps is not None:
            self.steps.install()

    def resume(self, checkpoint: Path, memory: Memory) -> None:
        if self.steps is not None and (reason := self.steps.load(checkpoint)) is not None:
            self._warn(f"no protected direction from before: {reason}")
        self.apply(memory)

    def react(self, refresh: Refresh, estimate: ConflictEstimate, memory: Memory) -> Memory:
        if self.steps is not None:
            always = self._config.gate == "always" or self.hold is not None  # whose lambda is 0 where none is needed
            wanted = always or in_conflict(estimate, self._config.advanced.gate_confidence)
            # Without a prompt that is solved sometimes there is no direction to protect; equally so on every rank.
            self.steps.open = wanted and bool(refresh.batches)
            if self.steps.open:
                steering = self._steering(refresh)
                loss, noise = pass1_loss(refresh, self._ranks.count, steering), direction_noise(refresh, steering)
                with without_dropout(self._trainer.model_wrapped):
                    self.steps.harvest(loss, refresh.batches, noise, same_samples=refresh.probe.reused)
        if self.hold is not None:
            self.hold.steering = None
            if memory.hold is None and not refresh.probe.reused:
                return replace(memory, hold=self.hold.begin(refresh))
        if self.floor is None:
            return memory
        floor = self.floor.learn(memory.floor, memory.pooled(self._config.pool_refreshes))
        return memory if refresh.probe.reused else memory.with_floor(floor)

    def follow(self, memory: Memory, window: WindowResult | None) -> Memory:
        if self.hold is None:
            return memory
        if memory.hold is None:
            return replace(memory, hold=self.hold.begin(None))
        if window is None:  # the first sample, or one after a sample that could not be scored
            return memory if self.hold.steering is not None else self.missed(memory)
        # No level of the newest sample, which measures what follows.
        held, change = window.memory.held, window.mean if self.hold.metric else window.estimate
        return replace(memory, hold=self.hold.step(memory.hold, held, change, window.ended - window.began))

    def missed(self, memory: Memory) -> Memory:
        if self.hold is None or memory.hold is None:
            return memory
        return replace(memory, hold=self.hold.controller.step(memory.hold, None))

    def measured(self, count: int) -> torch.Tensor:
        if self.hold is not None and self.hold.steering is not None:
            return ~self.hold.steering
        if self.steps is None:
            return super().measured(count)
        each = self._config.instruments != "angle"
        return torch.full((count,), each) & (torch.arange(count) % MEASURED_OF == MEASURED_OF - 1)

    def apply(self, memory: Memory) -> None:
        if self.floor is not None:
            self.floor.apply(self._in_force(memory))
        if self.hold is not None:
            self.hold.apply(memory.hold, memory.change.held)

    def _in_force(self, memory: Memory) -> FloorState:
        """Where the realised change is measured, the floor of the refresh before: no sample steers its own window."""
        return memory.floor_before if self._measures else memory.floor

    @property
    def _measures(self) -> bool:
        """Whether the realised change is."""
        return self._config.instruments != "angle" and self._config.source == "held_out"

    def _steering(self, refresh: Refresh) -> torch.Tensor:
        """[m] bool: prompts that the protected direction is taken from, none of whose change is measured."""
        return ~self.measured(refresh.num_samples.numel())

    def leave_unguarded(self) -> None:
        if self.steps is not None:
            self.steps.open = False

    def refresh_metrics(self, memory: Memory) -> dict[str, float | None]:
        metrics = self.floor.metrics(self._in_force(memory)) if self.floor is not None else {}
        if self.hold is not None:
            metrics |= self.hold.metrics(memory.hold, memory.change.held)
        if self.steps is not None:
            metrics["protected_reliability"] = self.steps.reliability if self.steps.open else None
        return metrics

    def step_metrics(self) -> dict[str, float | None]:
        return self.steps.step_metrics() if self.steps is not None else {}

    def save(self, checkpoint: Path) -> None:
        if self.steps is not None:
            self.steps.save(checkpoint)

    def remove(self) -> None:
        for part in (self.steps, self.floor, self.hold):
            if part is not None:
                part.remove()

    def action(self, memory: Memory) -> str:
        projects = self.steps is not None and self.hold is None
        parts = [f"project (gamma {self._config.gamma:g})"] if projects else []
        if self.hold is not None:
            parts.append(self.hold.action(memory.hold, memory.change.held))
        if self.floor is not None:
            parts.append(f"reweight (floor {self.floor.metrics(self._in_force(memory))['floor']:.2f})")
        return " and ".join(parts) or super().action(memory)
