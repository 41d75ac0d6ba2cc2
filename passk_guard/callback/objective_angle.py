"""The angle of what a run trains on itself, from the Gram matrices of the probe: only the prompt weights are others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from passk_guard.config import GuardConfig
from passk_guard.estimation.estimate import estimate_pooled
from passk_guard.estimation.records import ConflictEstimate, ProbeGram
from passk_guard.mitigation.objective import PassKObjective
from passk_guard.passk.objectives import grpo, passk, rloo
from passk_guard.passk.weighting import Weighting
from passk_guard.probe.verifier import Verifier
from passk_guard.utils.errors import GuardError
from passk_guard.utils.private_api import is_trl


def weighting_of(trainer: Any, verifier: Verifier) -> Weighting | None:
    """The prompt weights of the advantages that a TRL trainer computes from the 0/1 rewards of the verifier.

    Normalisation by length, clipping and a KL term are left out, as of every `Weighting`. A scale that is the same for
    a whole batch changes no angle. None where other rewards count too, or for another trainer.
    """
    if not is_trl(trainer):
        return None
    objective = PassKObjective.of(trainer)
    if objective is not None:
        if objective.correct is not verifier.function or objective.threshold != verifier.threshold:
            return None
        found = passk(objective.k, objective.floor, objective.cap)
    elif list(trainer.reward_funcs) != [verifier.function]:
        return None
    elif not any(kind.__name__ == "GRPOTrainer" for kind in type(trainer).__mro__):
        found = rloo()
    else:
        apart = getattr(trainer.args, "multi_objective_aggregation", "") == "normalize_then_sum"
        by_group = apart or getattr(trainer.args, "scale_rewards", "group") in ("group", True)
        found = grpo() if by_group else rloo()
    unbiased = is_pass_at_1(found) or (objective is not None and found.name == passk(objective.k).name)
    return found if unbiased else found.in_groups_of(trainer.num_generations)  # else the weight depends on their size


def is_pass_at_1(weighting: Weighting) -> bool:
    """Whether it weighs all prompts alike, so that its angle to pass@1 is zero."""
    return weighting.name in ("rloo", "passk:1")


def measure_objective(
    trainer: Any, verifier: Verifier, probes: Sequence[ProbeGram], config: GuardConfig
) -> tuple[str, ConflictEstimate] | None:
    """Name and angle of what the run trains on, over the refreshes with fresh samples.

    None where that is pass@1 or the guard's own pass@k, where there are no weights, or no fresh samples of enough.
    """
    weighting = weighting_of(trainer, verifier)
    if weighting is None or is_pass_at_1(weighting) or weighting.name == passk(config.k).name:
        return None
    fresh = [probe for probe in probes if not probe.reused]
    try:
        settings: dict[str, Any] = {"threshold": config.threshold, "confidence": config.confidence}
        return weighting.name, estimate_pooled(fresh, config.k, **settings, weighting=weighting, curve=False)
    except GuardError:  # fewer samples than the objective's k takes, or none that is fresh
        return None
