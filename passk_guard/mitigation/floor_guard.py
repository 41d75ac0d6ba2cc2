"""The floor under the prompt weights of a run's PassKObjective, solved from the probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from passk_guard.config import GuardConfig
from passk_guard.estimation.records import ProbeGram
from passk_guard.mitigation.floor import FloorSolution, FloorState, smooth_floor, solve_floor
from passk_guard.mitigation.objective import PassKObjective
from passk_guard.utils.errors import GuardError
from passk_guard.utils.ranks import Ranks


class FloorGuard:
    """Moves the floor of the installed objective, and does nothing else to the run.

    The floor comes from probes before the batch that it weighs: the weight of a sample must not depend on the sample.

    Args:
        objective: installed on the trainer; the `floor` it was given is the least that is ever used, its `cap` stays.
        config: floor_gamma, floor_max, advanced.floor_average.
        ranks: the processes of the run.
    """

    def __init__(self, objective: PassKObjective, config: GuardConfig, ranks: Ranks) -> None:
        self.objective, self.solution = objective, FloorSolution("undetermined", "no refresh yet")
        self._config, self._ranks = config, ranks
        self._given = objective.floor

    def learn(self, state: FloorState, probes: Sequence[ProbeGram]) -> FloorState:
        """The floor after one more refresh, the same on every rank; takes effect with `apply`.

        It is solved on refreshes with fresh samples, from those among the pooled ones, and stays on the others: a
        clipped weight has no unbiased estimate from samples of an earlier policy.

        Raises:
            FailedRefresh: it could not be solved on some rank.
        """
        if probes[-1].reused:
            self.solution = FloorSolution("undetermined", "no fresh samples")
            return state
        probes = [probe for probe in probes if not probe.reused]
        config = self._config
        largest = self._capped(config.floor_max)
        self.solution = self._ranks.together(
            lambda: solve_floor(probes, config.k, gamma=config.floor_gamma, largest=largest, cap=self.objective.cap)
        )
        new = smooth_floor(state, self.solution, config.advanced.floor_average, largest=largest)
        agreed = self._ranks.from_first(torch.tensor([new.floor, new.precision], dtype=torch.float64))
        return FloorState(*agreed.tolist())

    def apply(self, state: FloorState) -> None:
        """Compute advantages with this floor from here on."""
        self.objective.floor = self._in_force(state)

    def remove(self) -> None:
        """Give the objective its given floor back."""
        self.objective.floor = self._given

    def metrics(self, state: FloorState) -> dict[str, float | None]:
        """The floor for the next batch, the newest solution with its error, and both sides of the sufficient bound."""
        floor, cap = self._in_force(state) or 0.0, self.objective.cap
        highest = min(self.objective.k, cap) if cap is not None else self.objective.k
        return {
            "floor": floor,
            "floor_solved": self.solution.floor,
            "floor_se": self.solution.standard_error,
            "weight_ratio": highest / floor if floor else None,
            "weight_ratio_bound": self.solution.weight_ratio_bound,
        }

    def _in_force(self, state: FloorState) -> float | None:
        # A run may be resumed with a lower cap than its floor was solved under.
        return max(self._capped(state.floor), self._given or 0.0) if state.precision else self._given

    def _capped(self, floor: float) -> float:
        return floor if self.objective.cap is None else min(floor, self.objective.cap)


def installed_objective(trainer: Any, k: int) -> PassKObjective | None:
    """The PassKObjective of this trainer whose prompt weights a floor may bound: not one of max@k, which has none.

    Raises:
        GuardError: it trains on another k than the guard watches.
    """
    objective = PassKObjective.of(trainer)
    if objective is not None and objective.k != k:
        raise GuardError(
            f"Expected the guard and the objective to have the same k; found GuardConfig(k={k}) and "
            f"PassKObjective(k={objective.k})."
        )
    return None if objective is None or objective.threshold is None else objective


def choose_mitigation(
    mitigation: str, objective: PassKObjective | None, source: str, *, holds: bool
) -> tuple[str, str | None]:
    """The mitigation of a run, and how "auto" was decided.

    Args:
        mitigation: as set.
        objective: of the trainer.
        source: of the probe's completions.
        holds: whether pass@1 can be held: it is measured, and there are advantages that A_1 can be added to.

    Raises:
        GuardError: there is no objective to reweight, or "auto" can neither hold, reweight nor project.
    """
    if mitigation in ("reweight", "both") and objective is None:
        raise GuardError(
            f"Expected a PassKObjective of 0/1 rewards installed on the trainer for mitigation={mitigation!r}; found "
            "none. Run `with PassKObjective(trainer, k=...): trainer.train()`, or use mitigation='project'."
        )
    if mitigation != "auto":
        return mitigation, None
    if holds:
        return "hold", "auto: hold, since this trainer computes advantages and the change of pass@1 is measured"
    if objective is not None:
        return "reweight", "auto: reweight, since a PassKObjective computes the advantages of this trainer"
    if source == "training_batch":
        raise GuardError(
            "Expected a way to mitigate for mitigation='auto'; found none: no PassKObjective of 0/1 rewards is "
            "installed to reweight, and with source='training_batch' no second gradient can be taken to project. "
            "Install one, or pass held-out prompts as `probe`."
        )
    return "project", "auto: project, since no PassKObjective of 0/1 rewards computes the advantages of this trainer"
