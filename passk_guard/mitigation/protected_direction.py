"""The protected direction: the probe's pass@1 gradient in parameter space, and a rank's share of it in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from torch import Tensor, nn

from passk_guard.passk.closed_forms import sample_coefficients
from passk_guard.probe.refresh import Refresh
from passk_guard.sketch import TokenBatch
from passk_guard.sketch.backward import forward_logits, score_logits


@dataclass(frozen=True)
class Pass1Loss:
    r"""A loss whose gradient is -grad J_1 as the probe estimates it, up to the ranks' average.

    $-\nabla J_1 \approx -\frac{1}{m} \sum_x (\alpha^+_1 S^+_x + \alpha^-_1 S^-_x)$ with the leave-one-out advantages
    of `sample_coefficients` at k = 1. Samples of an earlier policy share them; their scores come times the `factors`
    of the batch. It is a loss to minimise, so its angle to a training gradient is the angle of the ascent directions.

    Attributes:
        coefficients: [2m] of S+ and S-, already divided by m; rows as in the slots of the batches.
        temperature: of the sampling.
        scale: number of ranks, since engines average over them and each holds a part of the sum.
    """

    coefficients: Tensor
    temperature: float
    scale: float

    def __call__(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """A scalar for the backward pass. Only its gradient means anything."""
        logits, slots = forward_logits(model, batch), batch.row_slots
        counted = batch.completion_mask * (slots >= 0)[:, None]
        _, gradient = score_logits(logits.detach(), batch.input_ids, counted, self.temperature)
        weight = self.coefficients.to(logits.device)[slots.clamp(min=0)] * (slots >= 0)
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


def _floating(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError("expected a tensor of real floating numbers")
    return tensor


class Share(BaseModel):
    """This rank's share in a checkpoint.

    Attributes:
        format: of the file.
        engine, ranks: the share is of use to the same engine on as many ranks.
        open: whether steps were guarded.
        protected: parts of the direction, moved to the CPU.
        on_cpu: whether each part was there before, as with an offloaded optimizer.
        norm_sq: squared norm of the whole direction, where it is known.
        sums, measured: numbers of the steps since the last log row, and how many steps; absent in the first versions.
    """

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True, hide_input_in_errors=True)

    format: Literal[1]
    engine: str
    ranks: int
    open: bool
    protected: list[Annotated[Tensor, AfterValidator(_floating)]] | None
    on_cpu: list[bool]
    norm_sq: Annotated[FiniteFloat, Field(ge=0)] | None = None
    sums: dict[str, FiniteFloat] = {}
    measured: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _fits(self) -> Share:
        if len(self.on_cpu) != len(self.protected or ()) or (self.sums and not self.measured):
            raise ValueError("expected as many places as parts, and steps that the sums are of")
        return self
