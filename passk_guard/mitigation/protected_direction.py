"""A rank's share of the protected direction as it stands in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passk_guard.passk.closed_forms import sample_coefficients
from passk_guard.probe.refresh import Refresh
from passk_guard.sketch import TokenBatch
from passk_guard.sketch.backward import forward_logits, score_logits
from passk_guard.utils.checkpoint import floating, listed, mapping, one_of, real, whole

# The protected direction: the probe's pass@1 gradient in parameter space, from samples that are already scored.


@dataclass(frozen=True)
class Pass1Loss:
    r"""A loss whose gradient is -grad J_1 as the probe estimates it, up to the ranks' average.

    $-\nabla J_1 \approx -\frac{1}{m} \sum_x (\alpha^+_1 S^+_x + \alpha^-_1 S^-_x)$ with the leave-one-out advantages
    of `sample_coefficients` at k = 1, which samples of an earlier policy share; their scores come times the `factors`
    of the batch. Written for a loss that is minimised, so that its angle to a training gradient
    is the angle of the two ascent directions.

    Attributes:
        coefficients: [2m] of S+ and S-, already divided by m; rows as in the slots of the batches.
        temperature: of the sampling.
        scale: number of ranks, since engines average over them and each holds a part of the sum.
    """

    coefficients: Tensor
    temperature: float
    scale: float

    def __call__(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """A scalar for the backward pass. Its gradient is the point; its value means nothing."""
        logits = forward_logits(model, batch.input_ids, batch.attention_mask)
        counted = batch.completion_mask.bool() & (batch.slots >= 0)[:, None]
        _, gradient = score_logits(logits.detach(), batch.input_ids, counted, self.temperature)
        weight = self.coefficients.to(logits.device)[batch.slots.clamp(min=0)] * (batch.slots >= 0)
        if batch.factors is not None:
            weight = weight * batch.factors.to(weight)
        gradient = gradient.float() * (-self.scale * weight.float())[:, None, None]
        return (logits.float() * gradient).sum()


def pass1_loss(refresh: Refresh, num_ranks: int, steering: Tensor | None = None) -> Pass1Loss:
    """The loss of one refresh, for `GradientEngine.probe_gradient` on `refresh.batches`.

    `steering` [m] bool leaves prompts out of it, whose change is measured instead; None takes all.
    """
    kept = refresh.num_samples >= refresh.fewest
    kept = (kept if steering is None else kept & steering).to(torch.float64)
    positive, negative = sample_coefficients(refresh.num_samples, refresh.num_correct, 1)
    coefficients = torch.cat([positive * kept, negative * kept]) / kept.sum().clamp(min=1)
    return Pass1Loss(coefficients.float(), refresh.temperature, float(num_ranks))


@dataclass(frozen=True)
class Share:
    """This rank's share in a checkpoint, each value of the kind it was saved as."""

    open: bool
    protected: list[Tensor] | None
    on_cpu: list[bool]
    norm_sq: float | None
    sums: dict[str, float]
    measured: int


def share_of(content: dict[str, Any]) -> Share:
    """Raises ValueError, TypeError or KeyError for what `StepGuard.save` never wrote."""
    protected, norm_sq = content["protected"], content.get("norm_sq")
    parts = None if protected is None else [floating(part) for part in listed(protected)]
    on_cpu = [one_of(one, True, False) for one in listed(content["on_cpu"])]
    if len(on_cpu) != len(parts or ()):
        raise ValueError("as many places as parts were expected")
    sums = mapping(content.get("sums", {}))  # this and the next are absent in the first versions
    measured = whole(content.get("measured", 0), 1 if sums else 0)
    return Share(
        open=one_of(content["open"], True, False),
        protected=parts,
        on_cpu=on_cpu,
        norm_sq=None if norm_sq is None else real(norm_sq, 0.0),
        sums={name: real(value) for name, value in sums.items()},
        measured=measured,
    )
