"""One forward and backward over a batch, with every covered module listened to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from passk_guard.sketch.accumulator import Accumulator
from passk_guard.sketch.forward import forward_logits
from passk_guard.sketch.head import ClosedHead
from passk_guard.sketch.loss import score_logits
from passk_guard.sketch.plan import Plan
from passk_guard.sketch.taps import Tap, tapped
from passk_guard.utils.isolation import frozen_pass as untouched


@dataclass(frozen=True)
class Batch:
    """Samples sorted by slot.

    Attributes:
        input_ids, attention_mask: [B, T] int64, padded on the right.
        completion: [B, T] bool, tokens whose log-probability counts.
        temperature: of the sampling.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion: Tensor
    temperature: float


@dataclass(frozen=True)
class Scored:
    """What a pass found.

    Attributes:
        accumulator: holds the sketched gradients.
        log_probs: [B] log pi(y | x) in nats.
        unseen: names of parameters to which at least one covered module contributed nothing.
    """

    accumulator: Accumulator
    log_probs: Tensor
    unseen: set[str]


def score_pass(
    model: nn.Module, plan: Plan, accumulator: Accumulator, checked: set[nn.Module], batch: Batch, closed: bool
) -> Scored | None:
    """Sketch the gradients of log pi(y | x) into `accumulator`.

    Args:
        model: the language model.
        plan: of that model.
        accumulator: empty, laid out for the batch.
        checked: norms whose formula has held before.
        batch: the samples.
        closed: whether the closed form stands in for the head. Ranks of a sharded model decide alike, since it
            depends on the model's code alone whether that turns out to apply.

    Returns:
        None if `closed` and the logits are not simply what the head returned; `accumulator` is then spoilt.

    Raises:
        GuardError: the model returns no logits that a gradient flows through.
    """
    head = None
    if closed and plan.head is not None:
        head = ClosedHead(plan.head, accumulator, batch.input_ids, batch.completion, batch.temperature)
    tap = Tap(plan.uses, accumulator, len(batch.input_ids), batch.input_ids.shape[1], checked)
    besides = None if head is None else head.use.module
    with untouched(model), tapped(model, tap, besides), torch.enable_grad():
        if head is None:
            logits = forward_logits(model, batch.input_ids, batch.attention_mask)
            log_probs, gradient = score_logits(logits.detach(), batch.input_ids, batch.completion, batch.temperature)
        else:
            if (stand_in := _stand_in(model, head, batch)) is None:
                return None
            logits, log_probs, gradient = stand_in, head.log_probs, stand_in.detach()
        logits.backward(gradient)
    return Scored(accumulator, log_probs, tap.unseen())


def _stand_in(model: nn.Module, head: ClosedHead, batch: Batch) -> Tensor | None:
    """The stand-in for the logits as the model returns it; None if it did anything else with it, or had none."""
    try:
        with head.installed():
            logits = forward_logits(model, batch.input_ids, batch.attention_mask)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if not head.handed_out:
            raise
        return None  # the stand-in cannot be written into
    return logits if head.made(logits) else None
