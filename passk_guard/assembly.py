"""From what the user passed to the parts of a guard, or an error that says what to pass instead."""

from __future__ import annotations

import logging
from typing import Any

from passk_guard.config import GuardConfig
from passk_guard.probe.held_out import HeldOut
from passk_guard.probe.prompts import ProbeSet
from passk_guard.probe.samplers import GenerateSampler, Sampler, TRLSampler
from passk_guard.probe.verifier import Verifier, resolve_verifier
from passk_guard.utils.errors import GuardError
from passk_guard.utils.private_api import is_trl

logger = logging.getLogger(__name__)


def choose_verifier(trainer: Any, correct: Any, config: GuardConfig) -> Verifier:
    if correct is None:
        names = getattr(trainer, "reward_func_names", [])
        raise GuardError(
            "Expected `correct`, the reward function that means a correct answer; found none. Pass the function"
            + (f", or the name of one of the trainer's: {names}." if names else ".")
        )
    return resolve_verifier(
        correct,
        getattr(trainer, "reward_funcs", ()),
        getattr(trainer, "reward_func_names", ()),
        threshold=config.correct_threshold,
        timeout=_time_limit(trainer, config),
    )


def _time_limit(trainer: Any, config: GuardConfig) -> float:
    """The other ranks wait in a collective, which must outlast the limit."""
    several = getattr(trainer.args, "world_size", 1) > 1
    return min(config.verifier_timeout, trainer.args.ddp_timeout / 2) if several else config.verifier_timeout


def held_out_source(
    trainer: Any, probe: Any, verifier: Verifier, sampler: Sampler | None, config: GuardConfig
) -> HeldOut:
    if probe is None:
        raise GuardError(
            "Expected `probe`, prompts held out from training; found none. Pass a list of rows, a JSONL path or a "
            "dataset, or GuardConfig(source='training_batch') to reuse the training batch."
        )
    prompts = ProbeSet.of(probe)
    prompts.require_columns(verifier.required_columns)
    _refuse_overlap(prompts, trainer.train_dataset, config.allow_overlap)
    sampler = sampler or choose_sampler(trainer, config)
    sampler.check_lengths(prompts.rows)
    return HeldOut(prompts, sampler, config.probe_prompts, config.num_samples, config.probe_seed)


def choose_sampler(trainer: Any, config: GuardConfig) -> Sampler:
    if is_trl(trainer) or hasattr(trainer, "_generate_single_turn"):
        return TRLSampler(trainer)
    if trainer.processing_class is None:
        raise GuardError("Expected a trainer with a tokenizer to sample with; pass `processing_class` to the trainer.")
    return GenerateSampler(
        trainer.model,
        trainer.processing_class,
        temperature=config.probe_temperature,
        max_new_tokens=config.probe_max_new_tokens,
        batch_size=config.probe_batch_size,
    )


def _refuse_overlap(prompts: ProbeSet, training: Any, allowed: bool) -> None:
    shared = [] if allowed or training is None else prompts.overlap(training)
    if shared is None:
        logger.info("passk_guard: the training set has no readable prompts; overlap with the probe is not checked")
    elif shared:
        raise GuardError(
            f"Expected probe prompts that are held out; found {len(shared)} of {len(prompts)} in the training set "
            f"(the first: {str(prompts[shared[0]]['prompt'])[:80]!r}). Remove them from one of the two, or pass "
            "GuardConfig(allow_overlap=True)."
        )


def check_groups(trainer: Any, config: GuardConfig) -> None:
    found = getattr(trainer, "num_generations", None)
    if found is not None and found < config.k:
        raise GuardError(
            f"Expected num_generations >= k to use the training batch as probe; found num_generations={found}, "
            f"k={config.k}. Raise `num_generations`, lower `k`, or pass held-out prompts as `probe`."
        )
