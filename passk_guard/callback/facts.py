"""What is being trained, and what a journal says of a run beside its numbers."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

from passk_guard.callback.objective_angle import is_pass_at_1, weighting_of
from passk_guard.config import GuardConfig
from passk_guard.mitigation.objective import PassKObjective
from passk_guard.passk.objectives import passk
from passk_guard.probe.prompts import HeldOut
from passk_guard.probe.verifier import Verifier
from passk_guard.utils.private_api import installed, is_trl

_LIBRARIES = ("passk-guard", "torch", "transformers", "trl", "accelerate", "deepspeed", "peft")
_SHAPES_THE_LOSS = ("loss_type", "scale_rewards", "normalize_advantages")


def objective_of(trainer: Any) -> str:
    """The objective of a run, such as `pass@8 (PassKObjective)` or `GRPO (loss_type=dapo, scale_rewards=group)`."""
    objective = PassKObjective.of(trainer)
    if objective is not None:
        return f"pass@{objective.k} (PassKObjective)"
    if not is_trl(trainer):
        return f"the loss of {type(trainer).__name__}"
    name = "RLOO" if any(kind.__name__ == "RLOOTrainer" for kind in type(trainer).__mro__) else "GRPO"
    found = {setting: getattr(trainer.args, setting, None) for setting in _SHAPES_THE_LOSS}
    return f"{name} ({', '.join(f'{setting}={value}' for setting, value in found.items() if value is not None)})"


def trains_on(trainer: Any, config: GuardConfig, verifier: Verifier) -> str:
    """A clause on what the run trains, and on what the angle says of it."""
    what, weighting = f"this run trains on {objective_of(trainer)}", weighting_of(trainer, verifier)
    if config.instruments == "change":
        return what
    if weighting is not None and weighting.name != passk(config.k).name:
        own = ", which weighs prompts as pass@1 does"
        what += own if is_pass_at_1(weighting) else ", whose own angle to pass@1 is `objective_cosine`"
    if PassKObjective.of(trainer) is not None:
        return what
    return f"{what}; the angle shows what training on pass@{config.k} would do"


def different_k(trainer: Any, config: GuardConfig) -> str | None:
    """A warning where the objective has another k than the guard."""
    objective = PassKObjective.of(trainer)
    if objective is None or objective.k == config.k:
        return None
    return (
        f"PassKObjective trains on pass@{objective.k} and the guard watches pass@{config.k}: pass k={objective.k} to "
        "the guard, or the same k to both"
    )


def cost_of_a_refresh(trainer: Any, source: HeldOut | None, config: GuardConfig) -> str:
    """A clause on how much is sampled for the probe, beside what a TRL trainer samples in the same steps."""
    if source is None:
        return "nothing is sampled for it"
    text = f"{min(source.size, len(source.probe)) * source.num_samples} completions a refresh"
    steps = config.refresh_steps
    if not is_trl(trainer) or steps is None:
        return text
    args = trainer.args
    each = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    span = "one step" if steps == 1 else f"{steps} steps"
    return f"{text}, beside {steps * each // getattr(trainer, 'num_iterations', 1)} of training in {span}"


def facts_of(trainer: Any, source: HeldOut | None) -> dict[str, Any]:
    """For the start of a journal: versions, objective, model, and a fingerprint of the probe's prompts."""
    versions = {name: found for name in _LIBRARIES if (found := installed(name)) != "(not installed)"}
    facts: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **versions},
        "objective": objective_of(trainer),
        "model": getattr(getattr(trainer.model, "config", None), "_name_or_path", "") or type(trainer.model).__name__,
        "probe": None,
    }
    if source is not None:
        keys = sorted(source.probe.key(i) for i in range(len(source.probe)))
        print_ = hashlib.blake2b("".join(keys).encode(), digest_size=8).hexdigest()
        facts["probe"] = {"prompts": len(keys), "fingerprint": print_}
    return facts
