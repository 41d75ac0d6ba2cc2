"""Whether the installed libraries still have what this run will touch, asked once, at train begin."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from passk_guard.config import GuardConfig
from passk_guard.mitigation.objective import PassKObjective
from passk_guard.probe.held_out import HeldOut
from passk_guard.probe.prompts import ProbeSet
from passk_guard.probe.samplers import GenerateSampler, Sampler, TRLSampler
from passk_guard.probe.verifier import Verifier, resolve_verifier
from passk_guard.sketch.coverage import SHARDED_NEEDS
from passk_guard.utils.errors import GuardError
from passk_guard.utils.isolation import check_model
from passk_guard.utils.private_api import OBSERVE, is_trl, requires

# Which guard acts on a trainer: one, once, and for as long as it is among the trainer's callbacks.


_KEY = "_passk_guard_attached"


class Attachment:
    """The claim of one guard on one trainer.

    A train() that was stopped by an exception leaves the guard's methods on the trainer until the next one begins.
    Whoever takes the guard off in between must not find it at work.

    Args:
        trainer: a transformers Trainer.
        guard: a callback.
        undo: gives the trainer its methods back.
    """

    needs = requires(
        "transformers",
        "Trainer",
        "any trainer and engine",
        OBSERVE,
        callback_handler="its `callbacks`, to find a guard that was taken off and a second one",
    )

    def __init__(self, trainer: Any, guard: Any, undo: Callable[[], None]) -> None:
        self._trainer, self._guard, self._undo = trainer, guard, undo
        self._listed = False

    def claim(self) -> None:
        """Become the trainer's guard, after undoing one that was taken off; a guard added twice stays once.

        Raises:
            GuardError: another guard is among the callbacks.
        """
        callbacks = self._callbacks()
        if others := [c for c in callbacks if isinstance(c, type(self._guard)) and c is not self._guard]:
            raise GuardError(
                f"Expected one {type(self._guard).__name__} on a trainer; found {len(others) + 1}. Take the others off "
                "with trainer.remove_callback, or watch several k in runs of their own."
            )
        while len(places := self._places(callbacks)) > 1:
            del callbacks[places[-1]]
        self._listed = bool(self._places(callbacks))
        before = vars(self._trainer).get(_KEY)
        if before is not None and before is not self:
            before._undo()
        setattr(self._trainer, _KEY, self)

    def release(self) -> None:
        """Leave no trace on the trainer."""
        if vars(self._trainer).get(_KEY) is self:
            delattr(self._trainer, _KEY)

    @property
    def stands(self) -> bool:
        """False once the guard was taken off; one that another callback calls was never on."""
        return not self._listed or bool(self._places(self._callbacks()))

    def _callbacks(self) -> list[Any]:
        callbacks: list[Any] = self._trainer.callback_handler.callbacks
        return callbacks

    def _places(self, callbacks: list[Any]) -> list[int]:
        return [i for i, c in enumerate(callbacks) if c is self._guard]


# From what the user passed to the parts of a guard, or an error that says what to pass instead.


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


def check_compatibility(trainer: Any, sampler: Sampler | None, *, taps_batch: bool) -> None:
    """Raise GuardError for a private name that this run needs and the installed libraries lack.

    Reads attributes and changes nothing. Engines check their own names when they are chosen, at train begin too.

    Args:
        trainer: whose train() begins.
        sampler: of held-out prompts, if there are any.
        taps_batch: whether the training batch is the probe.
    """
    Attachment.needs.check(trainer)
    check_model(trainer.model)
    for parameter in trainer.model.parameters():
        # ZeRO-3 empties a parameter outside a forward, and marks it with several names of this kind.
        if not parameter.numel() and any(name.startswith("ds_") for name in vars(parameter)):
            SHARDED_NEEDS.check(parameter)
    if isinstance(sampler, TRLSampler):
        sampler.needs.check(sampler.trainer)
    if taps_batch or PassKObjective.of(trainer) is not None:
        PassKObjective.needs.check(trainer)
