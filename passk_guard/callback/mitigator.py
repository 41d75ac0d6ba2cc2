"""What the guard does about a conflict: the floor under the advantages, the turn before the step, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from passk_guard.callback.realised import measured_prompts
from passk_guard.callback.state import Memory
from passk_guard.config import GuardConfig
from passk_guard.estimation.estimate import in_conflict
from passk_guard.estimation.records import ConflictEstimate
from passk_guard.mitigation import FloorState
from passk_guard.mitigation.engines import choose_engine
from passk_guard.mitigation.floor_guard import FloorGuard, choose_mitigation, installed_objective
from passk_guard.mitigation.gradient_guard import StepGuard
from passk_guard.mitigation.protected_direction import pass1_loss
from passk_guard.probe.refresh import Refresh
from passk_guard.utils.isolation import without_dropout
from passk_guard.utils.ranks import Ranks


class Mitigator:
    """The mitigation of one train(), as the config asks for it.

    Attributes:
        steps: turns gradients before optimizer steps; None where nothing does.
        floor: moves the floor of the objective; None where nothing does.
        remark: how "auto" was decided, if it was.

    Args:
        trainer: whose train() has begun.
        config: mitigation and its settings.
        ranks: the processes of the run.
        warn: told, once each, what no longer works and why.
        wanted: asked before each step whether the guard still is on the trainer.

    Raises:
        GuardError: a mitigation this trainer, its engine or its objective does not allow, and what to do.
    """

    def __init__(
        self,
        trainer: Any,
        config: GuardConfig,
        ranks: Ranks,
        warn: Callable[[str], None],
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._trainer, self._config, self._ranks, self._warn = trainer, config, ranks, warn
        self._wanted = wanted
        objective = (
            installed_objective(trainer, config.k) if config.mitigation in ("reweight", "both", "auto") else None
        )
        chosen, self.remark = choose_mitigation(config.mitigation, objective, config.source)
        self.floor = FloorGuard(objective, config, ranks) if chosen in ("reweight", "both") and objective else None
        self.steps = self._step_guard() if chosen in ("project", "both") else None

    def resume(self, checkpoint: Path, memory: Memory) -> None:
        """Go on from a checkpoint; says what was lost."""
        if self.steps is not None and (reason := self.steps.load(checkpoint)) is not None:
            self._warn(f"no protected direction from before: {reason}")
        self.apply(memory)

    def react(self, refresh: Refresh, estimate: ConflictEstimate, memory: Memory) -> Memory:
        """Solve for the floor, open or close the gate, and behind an open one take a new direction to protect.

        Raises:
            FailedRefresh: the direction could not be taken; the same on every rank.
        """
        if self.steps is not None:
            wanted = self._config.gate == "always" or in_conflict(estimate, self._config.advanced.gate_confidence)
            # Without a prompt that is solved sometimes there is no direction to protect; equally so on every rank.
            self.steps.open = wanted and bool(refresh.batches)
            if self.steps.open:
                with without_dropout(self._trainer.model_wrapped):
                    self.steps.harvest(pass1_loss(refresh, self._ranks.count, self._steering(refresh)), refresh.batches)
        if self.floor is None:
            return memory
        return memory.with_floor(self.floor.learn(memory.floor, memory.pooled(self._config.pool_refreshes)))

    def apply(self, memory: Memory) -> None:
        """Put the floor in force for the batches to come; at a step boundary, so that no batch sets its own."""
        if self.floor is not None:
            self.floor.apply(self._in_force(memory))

    def _in_force(self, memory: Memory) -> FloorState:
        """Where the realised change is measured, the floor of the refresh before: no sample steers its own window."""
        return memory.floor if self._config.instruments == "angle" else memory.floor_before

    def _steering(self, refresh: Refresh) -> torch.Tensor:
        """[m] bool: prompts that the protected direction is taken from, none of whose change is measured."""
        return ~measured_prompts(refresh.num_samples.numel(), self._config)

    def leave_unguarded(self) -> None:
        """After a void refresh: no step is turned by an old direction; the floor stays where it was."""
        if self.steps is not None:
            self.steps.open = False

    def refresh_metrics(self, memory: Memory) -> dict[str, float | None]:
        """Numbers that change with a refresh."""
        return self.floor.metrics(self._in_force(memory)) if self.floor is not None else {}

    def step_metrics(self) -> dict[str, float | None]:
        """Numbers of the steps since the last call."""
        return self.steps.step_metrics() if self.steps is not None else {}

    def save(self, checkpoint: Path) -> None:
        """This rank's share of what does not fit into the guard's memory."""
        if self.steps is not None:
            self.steps.save(checkpoint)

    def remove(self) -> None:
        """Leave trainer and objective as they were."""
        for part in (self.steps, self.floor):
            if part is not None:
                part.remove()

    def action(self, memory: Memory) -> str:
        """For a log line: what is done from this refresh on."""
        parts = [f"project (gamma {self._config.gamma:g})"] if self.steps is not None else []
        if self.floor is not None:
            parts.append(f"reweight (floor {self.floor.metrics(self._in_force(memory))['floor']:.2f})")
        return " and ".join(parts) or "observe"

    def _step_guard(self) -> StepGuard:
        guard = StepGuard(
            choose_engine(self._trainer),
            self._ranks,
            gamma=self._config.gamma,
            average=self._config.advanced.protected_average,
            dtype=getattr(torch, self._config.protected_dtype),
            on_failure=self._warn,
            wanted=self._wanted,
        )
        guard.install()
        return guard


class NoMitigation:
    """Does nothing: what a guard has in place of a `Mitigator` while no train() runs."""

    steps: StepGuard | None = None
    floor: FloorGuard | None = None
    remark: str | None = None

    def resume(self, checkpoint: Path, memory: Memory) -> None:
        """Nothing to go on from."""

    def react(self, refresh: Refresh, estimate: ConflictEstimate, memory: Memory) -> Memory:
        """The memory as it is."""
        return memory

    def apply(self, memory: Memory) -> None:
        """Nothing to put in force."""

    def leave_unguarded(self) -> None:
        """Nothing to close."""

    def refresh_metrics(self, memory: Memory) -> dict[str, float | None]:
        """No numbers."""
        return {}

    def step_metrics(self) -> dict[str, float | None]:
        """No numbers."""
        return {}

    def save(self, checkpoint: Path) -> None:
        """Nothing to save."""

    def remove(self) -> None:
        """Nothing to remove."""

    def action(self, memory: Memory) -> str:
        """For a log line."""
        return "observe"
