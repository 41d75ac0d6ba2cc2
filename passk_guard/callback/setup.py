"""From what the user passed to the parts of a guard; the one guard of a trainer; private names of the libraries."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from passk_guard.callback.budget import MOST_PROMPTS, sized_by_budget
from passk_guard.change import PASS_AT_1
from passk_guard.config import GuardConfig
from passk_guard.mitigation.objective import PassKObjective, too_few_samples
from passk_guard.probe.prompts import HeldOut, ProbeSet
from passk_guard.probe.samplers import Sampler, TRLSampler, choose_sampler
from passk_guard.probe.verifier import Verifier, resolve_verifier
from passk_guard.sketch.coverage import SHARDED_NEEDS
from passk_guard.utils.errors import GuardError
from passk_guard.utils.isolation import check_model
from passk_guard.utils.private_api import OBSERVE, requires
from passk_guard.utils.text import first_of

logger = logging.getLogger(__name__)
_KEY = "_passk_guard_attached"


class Attachment:
    """The claim of one guard on one trainer: one guard, once, for as long as it is among the trainer's callbacks.

    A train() that was stopped by an exception leaves the guard's patches on the trainer until the next one begins.
    A guard that the user removed in between must do nothing then.

    Args:
        trainer: a transformers Trainer.
        guard: a callback with `detach()`.
    """

    needs = requires(
        "transformers",
        "Trainer",
        "any trainer and engine",
        OBSERVE,
        callback_handler="its `callbacks`, to find a guard that was taken off and a second one",
    )

    def __init__(self, trainer: Any, guard: Any) -> None:
        self._trainer, self._guard = trainer, guard
        self._listed = False

    def claim(self) -> None:
        """Become the trainer's guard, after detaching one that was removed; a guard added twice stays once.

        Raises:
            GuardError: another guard is among the callbacks.
        """
        callbacks = self._trainer.callback_handler.callbacks
        if others := [c for c in callbacks if isinstance(c, type(self._guard)) and c is not self._guard]:
            raise GuardError(
                f"Expected one {type(self._guard).__name__} on a trainer; found {len(others) + 1}. Take the others off "
                "with trainer.remove_callback, or watch several k in separate runs."
            )
        while len(places := self._places()) > 1:
            del callbacks[places[-1]]
        self._listed = bool(places)
        before = vars(self._trainer).get(_KEY)
        if before is not None and before is not self._guard:
            before.detach()
        setattr(self._trainer, _KEY, self._guard)

    def release(self) -> None:
        """Leave no trace on the trainer."""
        if vars(self._trainer).get(_KEY) is self._guard:
            delattr(self._trainer, _KEY)

    @property
    def stands(self) -> bool:
        """False once the guard was removed; a guard that another callback calls was never listed."""
        return not self._listed or bool(self._places())

    def _places(self) -> list[int]:
        return [i for i, c in enumerate(self._trainer.callback_handler.callbacks) if c is self._guard]


def refuse_no_trainer(trainer: Any) -> None:
    """Raise GuardError unless this is a trainer, with the two lines to write."""
    if not (hasattr(trainer, "add_callback") and hasattr(trainer, "model")):
        raise GuardError(
            f"Expected the guard to have a transformers Trainer; found {type(trainer).__name__}. In `callbacks=[...]` "
            "no callback is told its trainer. Take the guard out of there, and write after the trainer is made: "
            "`guard = passk_guard.watch(trainer, probe=..., correct=..., k=8)` and then `trainer.train()`."
        )


def refuse_what_passes_cannot_read(trainer: Any, *, angle: bool) -> None:
    """Refuse trainers and models whose log-probabilities or gradients a pass over completions does not show.

    Args:
        trainer: a transformers Trainer.
        angle: whether gradients are measured, and not the realised change alone.

    Raises:
        GuardError: TRL's AsyncGRPOTrainer, a model patched by unsloth, or hooks on the gradients of parameters.
    """
    if any(kind.__name__ == "AsyncGRPOTrainer" for kind in type(trainer).__mro__):
        raise GuardError(
            "Expected a trainer whose model reads padded batches; found AsyncGRPOTrainer, whose model has attention "
            "for packed trees of samples alone, and whose samples a server makes while the policy moves on. Weights "
            "for that lag would not help with the first. Train with GRPOTrainer, also with vLLM, or without the guard."
        )
    forwards = [getattr(module, "forward", None) for module in trainer.model.modules()]
    makers = [getattr(f, "__module__", None) or "" for f in (type(trainer), *forwards)]
    if any(maker.startswith("unsloth") for maker in makers):
        raise GuardError(
            "Expected a model whose layers run as modules; found one patched by unsloth. Its adapters are applied "
            "inside fused functions that no hook sees, and its forward returns hidden states in the place of logits. "
            "Train with PEFT and TRL as they are, also in 4 bit, or without the guard."
        )
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad and p._backward_hooks]
    if angle and names:
        raise GuardError(
            f"Expected parameters without hooks on their gradients; found some on {first_of(names, 3)}. The sketch "
            "takes the gradient before them, such as that of rows which a hook freezes. Freeze whole parameters with "
            "requires_grad, or set instruments='change', which needs no gradient."
        )


def choose_verifier(trainer: Any, correct: Any, config: GuardConfig) -> Verifier:
    """The verifier that `correct` means; raises GuardError as `resolve_verifier`."""
    limit = config.verifier_timeout
    if getattr(trainer.args, "world_size", 1) > 1:  # the other ranks wait in a collective, which must outlast the limit
        limit = min(limit, trainer.args.ddp_timeout / 2)
    return resolve_verifier(
        correct,
        getattr(trainer, "reward_funcs", ()),
        getattr(trainer, "reward_func_names", ()),
        threshold=config.correct_threshold,
        timeout=limit,
    )


def choose_metric(trainer: Any, verifier: Verifier, config: GuardConfig) -> Verifier | None:
    """What scores completions for `hold_metric`, `verifier` itself where it is that; None for pass@1.

    Raises:
        GuardError: the trainer has no reward function of that name, or more than one, or it is a reward model.
    """
    names, name = list(getattr(trainer, "reward_func_names", ())), config.hold_metric
    if name == PASS_AT_1:
        return None
    if names.count(name) != 1:
        known = ", ".join(map(repr, names)) or "none"
        raise GuardError(
            f"Expected `hold_metric` to be 'pass@1' or to name one of the trainer's reward functions ({known}); found "
            f"{name!r}. Give a reward that is to be held and not trained on the weight 0 in `reward_weights`."
        )
    function = trainer.reward_funcs[names.index(name)]
    return verifier if function is verifier.function else choose_verifier(trainer, function, config)


def held_out_source(
    trainer: Any,
    probe: Any,
    verifier: Verifier,
    sampler: Sampler | None,
    config: GuardConfig,
    metric: Verifier | None = None,
) -> HeldOut:
    """The probe prompts with a sampler for them. Raises GuardError for prompts that cannot serve, as the guard."""
    if probe is None:
        raise GuardError(
            "Expected `probe`, prompts held out from training; found none. Pass a list of rows, a JSONL path or a "
            "dataset, or GuardConfig(source='training_batch') to reuse the training batch."
        )
    prompts = ProbeSet.of(probe)
    if getattr(trainer, "rollout_func", None) is None:  # which gives reward functions columns of its own
        prompts.require_columns((*verifier.required_columns, *(metric.required_columns if metric else ())))
    _refuse_overlap(prompts, trainer, config.allow_overlap)
    if sampler is None:
        _refuse_another_kind(prompts, trainer.train_dataset)
        sampler = _own_sampler(prompts, trainer, config)
    else:
        sampler.check_lengths(prompts.rows)
    _warn_of_mismatches(trainer, config)
    prompts_each = config.probe_prompts or MOST_PROMPTS
    if not sized_by_budget(config) and (reason := recurrence(len(prompts), prompts_each, config)) is not None:
        logger.warning("%s", reason)
    clusters = [] if config.cluster_by is None else prompts.clusters(config.cluster_by)
    return HeldOut(prompts, sampler, prompts_each, config.num_samples, config.probe_seed, clusters)


def _own_sampler(prompts: ProbeSet, trainer: Any, config: GuardConfig) -> Sampler:
    sampler = choose_sampler(
        trainer.model,
        trainer.processing_class,
        temperature=config.probe_temperature,
        max_new_tokens=config.probe_max_new_tokens,
        batch_size=config.probe_batch_size,
        trainer=trainer,
        tool_timeout=config.verifier_timeout,
    )
    try:
        sampler.check_lengths(prompts.rows)
    except GuardError as error:  # the sampler names its argument, and the user knows the setting
        raise GuardError(str(error).replace("`max_new_tokens`", "`probe_max_new_tokens`")) from None
    return sampler


def recurrence(size: int, prompts_each: int, config: GuardConfig) -> str | None:
    """A warning where a probe of `size` prompts, of which a refresh asks `prompts_each`, soon asks the same ones."""
    wanted = config.pool_refreshes * prompts_each
    if size >= wanted:
        return None
    after = "every refresh" if size <= prompts_each else f"{size / prompts_each:.1f} refreshes"
    return (
        f"passk_guard: the probe has {size} prompts, so that the same ones recur after {after}. What is estimated is "
        "the angle for prompts like these, and a prompt asked again adds little evidence of it. Pass at least "
        f"{wanted} prompts, which is pool_refreshes x probe_prompts ({config.pool_refreshes} x {prompts_each})"
    )


def _refuse_another_kind(prompts: ProbeSet, training: Any) -> None:
    if not prompts.of_another_kind(training):
        return
    kinds, remedy = ("texts", "lists of messages"), 'Convert the probe to [{"role": "user", "content": text}]'
    if prompts.chats:
        kinds = "lists of messages", "texts"
        remedy = "Pass tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), or the text"
    raise GuardError(
        f"Expected probe prompts of the kind that training has; found {kinds[0]} in the probe and {kinds[1]} in the "
        f"training set, so that the model would be asked in another form. {remedy}."
    )


def _warn_of_mismatches(trainer: Any, config: GuardConfig) -> None:
    if config.num_samples == config.k:
        logger.warning("%s", too_few_samples("num_samples", config.k))
    if getattr(trainer.args, "mask_truncated_completions", False):
        logger.warning(
            "passk_guard: training masks completions that reach max_completion_length "
            "(mask_truncated_completions=True), and the probe counts them, mostly as wrong. To leave them out of it "
            "too, let `correct` return None where `completion_ids` does not end in an end-of-sequence token, or raise "
            "`max_completion_length`."
        )


def _renderings(tokenizer: Any) -> Callable[[Any], list[str]]:
    """From a list of messages to the texts that it may have been made to: by the template, and its only content."""

    def render(messages: Any) -> list[str]:
        texts = [messages[0]["content"]] if len(messages) == 1 and isinstance(messages[0]["content"], str) else []
        with suppress(Exception):  # no template, or one that does not take these messages
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return texts

    return render


def _refuse_overlap(prompts: ProbeSet, trainer: Any, allowed: bool) -> None:
    training, render = trainer.train_dataset, _renderings(trainer.processing_class)
    shared = [] if allowed or training is None else prompts.overlap(training, render)
    if shared is None:
        logger.info("passk_guard: the training set has no readable prompts; overlap with the probe is not checked")
    elif shared:
        raise GuardError(
            f"Expected probe prompts that are held out; found {len(shared)} of {len(prompts)} in the training set "
            f"(the first: {str(prompts[shared[0]]['prompt'])[:80]!r}). Remove them from one of the two, or pass "
            "GuardConfig(allow_overlap=True)."
        )


def check_groups(trainer: Any, config: GuardConfig) -> None:
    """Raise GuardError unless a training batch has k completions of each prompt."""
    found = getattr(trainer, "num_generations", None)
    if found is not None and found < config.k:
        raise GuardError(
            f"Expected num_generations >= k to use the training batch as probe; found num_generations={found}, "
            f"k={config.k}. Raise `num_generations`, lower `k`, or pass held-out prompts as `probe`."
        )
    if found == config.k:
        logger.warning("%s", too_few_samples("num_generations", config.k))


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
