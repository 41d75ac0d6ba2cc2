"""The training gradient, held at an angle to the protected one before each optimizer step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from passk_guard.mitigation.engines import GradientEngine
from passk_guard.mitigation.projection import plan_held, plan_projection
from passk_guard.mitigation.protected_direction import DirectionNoise, Share
from passk_guard.probe.out_of_memory import halved, largest, until_it_fits
from passk_guard.sketch import TokenBatch, filler_batch
from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.files import save_whole
from passk_guard.utils.ranks import Ranks
from passk_guard.utils.text import Once, describe_error, one_line

Loss = Callable[[nn.Module, TokenBatch], Tensor]
_EXACT = DirectionNoise()
_LOW = 0.5  # reliability below which the log warns
_QUANTILE = 1.645  # one-sided 5% of a normal law


class StepGuard:
    """Projects the gradient of a step while its gate is open, and does nothing else to the run.

    Before clipping and before the optimizer, with g the accumulated training gradient and p the protected one:
    g <- g + c p with the c of `mitigation.plan_projection`. A step costs one pass over g and p and one reduction of two
    scalars over ranks. Where the constraint binds, one more pass follows, in which each rank changes its own shards.

    Attributes:
        open: whether steps are guarded; where False, or without a protected direction, a step stays bit-for-bit.
        protected: this rank's parts of p, None before the first harvest.
        hold: lambda of `plan_held`, which then gives c; None projects.

    Args:
        engine: how this trainer's gradient is reached.
        ranks: the processes of the run.
        gamma: smallest cosine to p, in [0, 1).
        average: p <- average p + (1 - average) new, in [0, 1); 0 takes each new direction as it is.
        dtype: that p is kept in.
        on_failure: called once with each reason why steps are no longer guarded.
        wanted: called before each step; False leaves it unchanged.
    """

    def __init__(
        self,
        engine: GradientEngine,
        ranks: Ranks,
        *,
        gamma: float,
        average: float,
        dtype: torch.dtype,
        on_failure: Callable[[str], None],
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self.engine, self.open = engine, False
        self.protected: list[Tensor] | None = None
        self.hold: float | None = None
        self._norm_sq: float | None = None  # of the protected direction; the same for all its steps
        self._noise = _EXACT  # of it, absolute
        self._proven = True  # whether the protected direction is known to be of this model
        self._ranks, self._gamma, self._average, self._dtype = ranks, gamma, average, dtype
        self._on_failure, self._wanted = on_failure, wanted
        self._halvings = 0  # of the probe's batches, until the backward pass fits into memory
        self._reported = Once()
        self._sums: dict[str, float] = {}  # of the numbers of the steps since the last log row
        self._measured = 0

    def install(self) -> None:
        """Act before the optimizer steps of this trainer."""
        self.engine.install(self._before_step)

    def remove(self) -> None:
        """Leave the trainer as it was."""
        self.engine.remove()

    def harvest(
        self, loss: Loss, batches: Sequence[TokenBatch], noise: DirectionNoise = _EXACT, *, same_samples: bool = False
    ) -> None:
        """Take a new protected direction from the probe, at a step boundary.

        Where memory runs out on a rank, all ranks try again with batches of half the size, and keep to that size.

        Args:
            noise: of the new direction, in units of its squared norm.
            same_samples: whether the direction before is of the same samples.

        Raises:
            FailedRefresh: on all ranks, when the loss failed on one or the gradient is not finite.
        """
        pieces = list(batches)
        for _ in range(self._halvings):
            pieces = halved(pieces)

        def probe() -> list[Tensor]:
            careful = _KeepInStep(loss)
            gradient = self.engine.probe_gradient(pieces, careful, self._dtype)
            careful.raise_failure()
            return gradient

        def smaller() -> bool:
            nonlocal pieces
            if largest(self._ranks, pieces)[1] <= 1:
                return False
            pieces = halved(pieces)
            self._halvings += 1
            return True

        self._proven = True
        new = until_it_fits(self._ranks, lambda: self._ranks.together(probe), smaller)
        norm_sq = self.engine.inner_products([(new, new)])[0]
        if not math.isfinite(norm_sq):
            raise FailedRefresh("the probe's pass@1 gradient is not finite")
        noise = noise.times(norm_sq)
        if self.protected is not None and self._average:
            for old, fresh in zip(self.protected, new, strict=True):
                fresh.mul_(1 - self._average).add_(old, alpha=self._average)
            noise = self._noise.averaged(noise, self._average, same_samples=same_samples)
            norm_sq = self.engine.inner_products([(new, new)])[0]
        self.protected, self._norm_sq, self._noise = new, norm_sq, noise
        self._tell_noise(norm_sq, noise)

    @property
    def reliability(self) -> float | None:
        """U_11 / |p|^2: the share of |p|^2 that is no noise, below 0 by chance; None without a direction."""
        if self.protected is None:
            return None
        return 1 - self._noise.squared / self._norm_sq if self._norm_sq else 1.0

    def _tell_noise(self, norm_sq: float, noise: DirectionNoise) -> None:
        """One line for a direction that is mostly noise, and one where it may be nothing else."""
        signal, remedy = norm_sq - noise.squared, "raise `probe_prompts` or `advanced.protected_average`"
        if noise.squared and signal <= _QUANTILE * noise.spread:
            if self._reported.new("may be noise"):
                self._on_failure(f"no pass@1 gradient is established, so that steps may be held to noise: {remedy}")
        elif signal < _LOW * norm_sq and self._reported.new("noise"):
            share = f"{100 * signal / norm_sq:.0f}%"
            self._on_failure(f"the protected direction is pass@1's gradient by {share} and noise otherwise: {remedy}")

    def step_metrics(self) -> dict[str, float | None]:
        """Means over the steps since the last call: what was done to the gradient and what it took.

        Returns:
            Nothing where no step was measured; else train_cosine (of the gradient before), mitigated (share of steps
            that were changed), coefficient, gradient norms before and after, seconds.
        """
        means: dict[str, float | None] = {name: total / self._measured for name, total in self._sums.items()}
        self._sums, self._measured = {}, 0
        return means

    def _before_step(self) -> None:
        if not self.open or self.protected is None or not self._wanted():
            return
        try:
            self._project(self.protected)
        except Exception as error:  # on every rank alike: a version of the engine that is not what it was taken for
            self.open = False
            reason = str(error) if isinstance(error, FailedRefresh) else describe_error(error)
            self._fail(f"steps are left unguarded until the next refresh: {reason}")

    def _project(self, protected: list[Tensor]) -> None:
        began = time.perf_counter()
        gradient, scale = self._ranks.together(lambda: (self.engine.gradient(), self.engine.loss_scale()))
        if not self._proven and [part.shape for part in gradient] != [part.shape for part in protected]:
            raise FailedRefresh("the protected direction in the checkpoint is of another model")
        self._proven = True
        pairs = [(gradient, protected), (gradient, gradient)]
        if self._norm_sq is None:
            pairs.append((protected, protected))
        inner, own, *norm_sq = self.engine.inner_products(pairs)
        if self._norm_sq is None:
            self._norm_sq = norm_sq[0]
        scalars = inner / scale, own / scale**2, self._norm_sq
        plan = plan_projection(*scalars, self._gamma) if self.hold is None else plan_held(*scalars, self.hold)
        if plan.reason is not None:
            self._fail(f"steps stay unchanged where {plan.reason}")
            return
        if plan.coefficient:
            self.engine.add_(gradient, plan.keeps - 1)
            self.engine.add_(protected, plan.coefficient * scale)
        numbers = {
            "train_cosine": plan.cosine_before or 0.0,
            "mitigated": float(plan.coefficient > 0),
            "coefficient": plan.coefficient,
            "grad_norm_before": plan.norm_before,
            "grad_norm_after": plan.norm_after,
            "mitigation_seconds": time.perf_counter() - began,
        }
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in numbers.items()}
        self._measured += 1

    def _fail(self, reason: str) -> None:
        if self._reported.new(reason):
            self._on_failure(reason)

    # Across a checkpoint

    def save(self, folder: Path) -> None:
        """Write this rank's share of the protected direction into a checkpoint folder, whole or not at all."""
        share = Share(
            format=1,
            engine=self.engine.name,
            ranks=self._ranks.count,
            open=self.open,
            protected=None if self.protected is None else [part.cpu() for part in self.protected],
            on_cpu=[part.device.type == "cpu" for part in self.protected or ()],  # offloaded, or all there is
            norm_sq=self._norm_sq,
            noise=(self._noise.squared, self._noise.spread),
            sums=self._sums,
            measured=self._measured,
        )
        save_whole(dict(share), folder / self._file_name())

    def load(self, folder: Path) -> str | None:
        """Take it up again, on all ranks or on none; returns why not, None when it was taken."""
        share = self._read(folder / self._file_name())
        if self._ranks.max(int(isinstance(share, str))) or isinstance(share, str):
            return share if isinstance(share, str) else "another rank could not read its share"
        self.open, self._sums, self._measured = share.open, share.sums, share.measured
        if share.protected is not None:
            parts = zip(share.protected, share.on_cpu, strict=True)
            self._norm_sq, self._proven = share.norm_sq, False
            self._noise = DirectionNoise(*share.noise)
            self.protected = [part if on_cpu else part.to(self._ranks.device) for part, on_cpu in parts]
        return None

    def _read(self, path: Path) -> Share | str:
        """The share, or why there is none."""
        if not path.is_file():
            return "the checkpoint has no protected direction"
        try:
            share = Share.model_validate(torch.load(path, weights_only=True, map_location="cpu"))
        except Exception as error:  # of a damaged file torch raises whatever its reader stumbles over
            return f"{path.name} cannot be read: {describe_error(error)}"
        if (share.ranks, share.engine) != (self._ranks.count, self.engine.name):
            return (
                f"it was saved on {share.ranks} ranks of {one_line(share.engine, 40)}, "
                f"and this run has {self._ranks.count} of {self.engine.name}"
            )
        return share

    def _file_name(self) -> str:
        return f"passk_guard_rank{self._ranks.index}.pt"


class _KeepInStep:
    """A loss that fails on one rank runs fillers there from then on, or the others would wait in their backward."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._failure: Exception | None = None

    def __call__(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        if self._failure is None:
            try:
                return self._loss(model, batch)
            except Exception as error:
                self._failure = error.with_traceback(None)  # its frames would keep what there was no room for
        token = int(batch.input_ids[0, 0])
        return self._loss(model, filler_batch(pad_token_id=token, device=batch.input_ids.device))

    def raise_failure(self) -> None:
        """What went wrong, once all ranks are through."""
        failure, self._failure = self._failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # or its traceback would keep the gradient until the collector comes
