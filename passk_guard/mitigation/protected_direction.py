"""The protected direction: the probe's pass@1 gradient in parameter space, its noise, a rank's share of it on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from torch import Tensor, nn

from passk_guard.estimation.ustatistics import coefficients, prompt_kernel
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


@dataclass(frozen=True)
class DirectionNoise:
    r"""How much of |p|^2 is noise, p being the mean of s prompts' gradients g(x).

    $|p|^2 = \frac{1}{s^2} \sum_{x, x'} \langle g(x), g(x') \rangle$ has the mean |grad J_1|^2 + E|noise|^2. The pairs
    of different prompts alone give $U_{11}$, which is unbiased for |grad J_1|^2, so that |p|^2 - U_11 is the noise.

    Attributes:
        squared: |p|^2 - U_11; in units of |p|^2 or absolute.
        spread: standard deviation of U_11 where grad J_1 is zero, in the same units.
    """

    squared: float = 0.0
    spread: float = 0.0

    def times(self, factor: float) -> DirectionNoise:
        """Of p times the root of `factor`."""
        return DirectionNoise(self.squared * factor, self.spread * factor)

    def averaged(self, new: DirectionNoise, weight: float, *, same_samples: bool) -> DirectionNoise:
        """Of weight * p + (1 - weight) * new p. The noise of fresh samples is independent, of the same it is equal.

        The spreads then add like the variances, exactly where both noises have proportional covariances, else at most.
        """

        def mixed(old: float, fresh: float) -> float:
            old, fresh = weight * math.sqrt(max(0.0, old)), (1 - weight) * math.sqrt(max(0.0, fresh))
            return (old + fresh) ** 2 if same_samples else old**2 + fresh**2

        return DirectionNoise(mixed(self.squared, new.squared), mixed(self.spread, new.spread))


def direction_noise(refresh: Refresh, steering: Tensor | None = None) -> DirectionNoise:
    """The noise of the direction of `pass1_loss`, in units of its |p|^2: both are of the same prompts and sketch.

    Where grad J_1 is zero, U_11 is degenerate, with the variance 2 E<g(x), g(x')>^2 / (s (s - 1)) over pairs (Hoeffding
    1948). All is noise with fewer than two prompts.
    """
    probe = refresh.probe
    row = coefficients(probe, torch.ones(1, dtype=torch.int64))[0]
    kernel = prompt_kernel(probe, row, row)
    if steering is not None:
        steers = steering[refresh.num_samples >= refresh.fewest]
        kernel = kernel[steers][:, steers]
    count, norm_sq = len(kernel), float(kernel.mean()) if kernel.numel() else 0.0
    if count < 2 or not norm_sq > 0:
        return DirectionNoise(1.0, 0.0)
    kernel.fill_diagonal_(0)
    between = float(kernel.sum()) / (count * (count - 1))
    spread = math.sqrt(2) * float(kernel.norm()) / (count * (count - 1))
    return DirectionNoise(1 - between / norm_sq, spread / norm_sq)


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
        noise: its squared noise and spread, absolute; absent in the first versions.
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
    noise: tuple[FiniteFloat, FiniteFloat] = (0.0, 0.0)
    sums: dict[str, FiniteFloat] = {}
    measured: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _fits(self) -> Share:
        if len(self.on_cpu) != len(self.protected or ()) or (self.sums and not self.measured):
            raise ValueError("expected as many places as parts, and steps that the sums are of")
        return self
