"""From what a module kept of its input and the gradient of its output: the gradients of its parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passk_guard.sketch.accumulator import Accumulator
from passk_guard.sketch.layers import Kind, Use
from passk_guard.sketch.norms import normalised_input


def by_sample(x: Tensor, batch: int, width: int) -> Tensor | None:
    """x [B, ..., d] or flattened [B T, d] as [B, tokens, d]; None where samples cannot be told apart."""
    if batch == 1 or (x.dim() > 1 and x.shape[0] == batch):
        return x.reshape(batch, -1, x.shape[-1])
    if x.dim() == 2 and x.shape[0] == batch * width:
        return x.reshape(batch, width, -1)
    return None


@dataclass(frozen=True)
class Contribution(ABC):
    """The rule of one kind of module. u is its input, delta the gradient of its output, both [B, T, d]."""

    use: Use
    accumulator: Accumulator

    @abstractmethod
    def keep(self, u: Tensor) -> tuple[Tensor, ...]:
        """What of the input the rule needs in the backward."""

    @abstractmethod
    def add(self, delta: Tensor, kept: Sequence[Tensor]) -> None:
        """Add this module's share, given what `keep` returned."""

    def add_bias(self, delta: Tensor) -> None:
        """d bias = sum_t delta_t."""
        if self.use.bias is not None:
            self.accumulator.add_vector(self.use.bias, delta.sum(1, dtype=self.accumulator.rows.dtype))


class LinearContribution(Contribution):
    """dW = sum_t delta_t u_t^T in the weight's layout [out, in]."""

    def keep(self, u: Tensor) -> tuple[Tensor, ...]:
        return () if self.use.weight is None else (self.accumulator.project(self.use.weight, "right", u),)

    def add(self, delta: Tensor, kept: Sequence[Tensor]) -> None:
        if (name := self.use.weight) is not None:
            self.accumulator.add_matrix(name, self.accumulator.project(name, "left", delta), kept[0])
        self.add_bias(delta)


class Conv1DContribution(Contribution):
    """dW = sum_t u_t delta_t^T in the weight's layout [in, out]."""

    def keep(self, u: Tensor) -> tuple[Tensor, ...]:
        return () if self.use.weight is None else (self.accumulator.project(self.use.weight, "left", u),)

    def add(self, delta: Tensor, kept: Sequence[Tensor]) -> None:
        if (name := self.use.weight) is not None:
            self.accumulator.add_matrix(name, kept[0], self.accumulator.project(name, "right", delta))
        self.add_bias(delta)


class EmbeddingContribution(Contribution):
    """dW[v] = sum over t with id_t = v of delta_t, in the weight's layout [vocabulary, d]."""

    def keep(self, u: Tensor) -> tuple[Tensor, ...]:
        return (u.squeeze(-1),)

    def add(self, delta: Tensor, kept: Sequence[Tensor]) -> None:
        assert self.use.weight is not None
        ids, module = kept[0], self.use.module
        if (scale := getattr(module, "embed_scale", None)) is not None:
            delta = delta * scale
        if (padding := getattr(module, "padding_idx", None)) is not None:
            delta = delta.masked_fill((ids == padding)[..., None], 0)  # as in autograd: this row never learns
        name = self.use.weight
        self.accumulator.add_rows(name, ids, self.accumulator.project(name, "right", delta))


class NormContribution(Contribution):
    """dw = sum_t delta_t * u_hat_t and db = sum_t delta_t, exact; also for Gemma's u_hat (1 + w)."""

    def keep(self, u: Tensor) -> tuple[Tensor, ...]:
        return (u,)

    def add(self, delta: Tensor, kept: Sequence[Tensor]) -> None:
        if (name := self.use.weight) is not None:
            x_hat = normalised_input(self.use.module, kept[0])
            self.accumulator.add_vector(name, torch.einsum("btd,btd->bd", delta.to(x_hat.dtype), x_hat))
        self.add_bias(delta)


CONTRIBUTIONS: dict[Kind, type[Contribution]] = {
    "linear": LinearContribution,
    "conv1d": Conv1DContribution,
    "embedding": EmbeddingContribution,
    "layer_norm": NormContribution,
    "rms_norm": NormContribution,
}
