"""The kinds of modules that are sketched: how each is recognised, and the gradients of its parameters.

The gradients follow from the input of the module, or a projection of it, and the gradient of its output.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from passk_guard.sketch.accumulator import Accumulator

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
_CHECKED_TOKENS = 64  # at which the output of a layer is compared with its formula
_ROUNDING = 0.02  # by which it may differ, relative to its norm

Kind = Literal["linear", "conv1d", "embedding", "layer_norm", "rms_norm"]


@dataclass(frozen=True)
class Use:
    """One covered module, with the names under which its trainable parameters are sketched.

    A tied weight has one name and several uses, so that its contributions add as vectors.
    """

    module: nn.Module
    kind: Kind
    weight: str | None
    bias: str | None


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of the module, or None where the gradients of its parameters are not known.

    A subclass that overrides `forward` computes something else, so it is not of its parent's kind.
    """
    forward = type(module).forward
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2: weight [in, out]
        return "conv1d"
    if isinstance(module, nn.Embedding) and _is_plain_embedding(module):
        return "embedding"
    if isinstance(module, nn.LayerNorm) and forward is nn.LayerNorm.forward:
        return "layer_norm" if len(module.normalized_shape) == 1 else None
    return "rms_norm" if _is_rms_norm(module) else None


def _is_rms_norm(module: nn.Module) -> bool:
    """True for nn.RMSNorm and for classes named *RMSNorm that hold one 1-D weight.

    The name is a guess only: gated and offset variants fail `formula_holds`.
    """
    own = dict(module.named_parameters())
    return "RMSNorm" in type(module).__name__ and list(own) == ["weight"] and own["weight"].dim() == 1


def _is_plain_embedding(module: nn.Embedding) -> bool:
    if module.scale_grad_by_freq or module.max_norm is not None:
        return False
    # Gemma multiplies the looked-up rows by `embed_scale`; the hook multiplies the gradient by it.
    scaled = type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")
    return scaled or type(module).forward is nn.Embedding.forward


def by_sample(x: Tensor, batch: int, width: int) -> Tensor | None:
    """x [B, ..., d] or flattened [B T, d] as [B, tokens, d]; None where samples cannot be told apart.

    [B, d] may be B tokens of any samples that a router has sent to an expert.
    """
    if batch == 1 or (x.dim() > 2 and x.shape[0] == batch):
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
        """The tensors of the input that the backward needs."""

    @abstractmethod
    def add(self, delta: Tensor, kept: Sequence[Tensor]) -> None:
        """Add the gradients of this module's parameters, given what `keep` returned."""

    @staticmethod
    def outputs(module: nn.Module, u: Tensor) -> tuple[Tensor, ...]:
        """What a module of this kind may return for u [N, d] (indices [N] for an embedding); none: not checked."""
        return ()

    def add_bias(self, delta: Tensor) -> None:
        """d bias = sum_t delta_t."""
        if self.use.bias is not None:
            self.accumulator.add_vector(self.use.bias, delta.sum(1, dtype=self.accumulator.rows.dtype))


class LinearContribution(Contribution):
    """dW = sum_t delta_t u_t^T in the weight's layout [out, in].

    The projection of u is kept where it is narrower than u. That of a LoRA factor is wider: u is kept, which the layers
    that read the same tensor share, and projected in the backward.
    """

    input_side, output_side = "right", "left"

    def keep(self, u: Tensor) -> tuple[Tensor, ...]:
        if (name := self.use.weight) is None:
            return ()
        narrower = self.accumulator.narrows(name, self.input_side)
        return (self.accumulator.project(name, self.input_side, u) if narrower else u,)

    def add(self, delta: Tensor, kept: Sequence[Tensor]) -> None:
        if (name := self.use.weight) is not None:
            factor = kept[0]
            if not self.accumulator.narrows(name, self.input_side):
                factor = self.accumulator.project(name, self.input_side, factor)
            projected = self.accumulator.project(name, self.output_side, delta)
            self.accumulator.add_matrix(name, **{self.input_side: factor, self.output_side: projected})
        self.add_bias(delta)

    @staticmethod
    def outputs(module: nn.Module, u: Tensor) -> tuple[Tensor, ...]:
        weight, bias = _own(module)
        return (nn.functional.linear(u.to(weight.dtype), weight, bias),)


class Conv1DContribution(LinearContribution):
    """dW = sum_t u_t delta_t^T in the weight's layout [in, out]."""

    input_side, output_side = "left", "right"

    @staticmethod
    def outputs(module: nn.Module, u: Tensor) -> tuple[Tensor, ...]:
        weight, bias = _own(module)
        return (nn.functional.linear(u.to(weight.dtype), weight.t(), bias),)


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
            delta = delta.masked_fill((ids == padding)[..., None], 0)  # as in autograd: this row has no gradient
        name = self.use.weight
        self.accumulator.add_rows(name, ids, self.accumulator.project(name, "right", delta))

    @staticmethod
    def outputs(module: nn.Module, u: Tensor) -> tuple[Tensor, ...]:
        return (_own(module)[0][u] * getattr(module, "embed_scale", 1),)


class NormContribution(Contribution):
    """dw = sum_t delta_t * u_hat_t and db = sum_t delta_t, exact; also for Gemma's u_hat (1 + w)."""

    def keep(self, u: Tensor) -> tuple[Tensor, ...]:
        return (u,)

    def add(self, delta: Tensor, kept: Sequence[Tensor]) -> None:
        if (name := self.use.weight) is not None:
            x_hat = normalised_input(self.use.module, kept[0])
            self.accumulator.add_vector(name, torch.einsum("btd,btd->bd", delta.to(x_hat.dtype), x_hat))
        self.add_bias(delta)

    @staticmethod
    def outputs(module: nn.Module, u: Tensor) -> tuple[Tensor, ...]:
        (weight, bias), x_hat = _own(module), normalised_input(module, u)
        if isinstance(module, nn.LayerNorm):
            return (x_hat * weight + (0 if bias is None else bias),)
        return (x_hat * weight, x_hat * (1 + weight))  # the second one is Gemma's


def normalised_input(module: nn.Module, x: Tensor) -> Tensor:
    """x_hat, of which the module returns x_hat * weight (+ bias), in at least fp32; same shape as x [..., d]."""
    wide = x if x.dtype == torch.float64 else x.float()
    if isinstance(module, nn.LayerNorm):
        return nn.functional.layer_norm(wide, wide.shape[-1:], eps=module.eps)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _epsilon(module, x.dtype))


def _epsilon(module: nn.Module, dtype: torch.dtype) -> float:
    for name in _EPS_NAMES:
        if isinstance(value := getattr(module, name, None), float):
            return value
    return torch.finfo(dtype).eps  # the meaning of eps=None in nn.RMSNorm


def _own(module: Any) -> tuple[Tensor, Tensor | None]:
    return module.weight, getattr(module, "bias", None)


def formula_holds(use: Use, x: Tensor, output: Tensor) -> bool | None:
    """Whether `output` is what a module of this kind returns for x, at up to 64 tokens; None for zeros or no numbers.

    A subclass, a hook or a replaced forward may have changed it. The gradients of the parameters are then others.
    Called while the weights are gathered, where the model is sharded.

    Args:
        x: [..., d], or indices of any shape for an embedding. output: the same with another last dimension.
    """
    rows = output.flatten(0, -2)
    u = x.flatten() if use.kind == "embedding" else x.flatten(0, -2)
    if len(u) != len(rows):
        return False
    if len(rows) == 0:
        return None
    picked = torch.linspace(0, len(rows) - 1, min(_CHECKED_TOKENS, len(rows)), device=x.device).long()
    found = rows[picked]
    try:
        expected = CONTRIBUTIONS[use.kind].outputs(use.module, u[picked])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError):  # the weight has another shape, or has been released
        return False
    if not expected:
        return True
    if not 0 < float(found.float().norm()) < math.inf:
        return None
    return any(is_close(found, each) for each in expected)


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether each row of found [..., d] is that of `expected`, but for rounding: of 16 bits at most."""
    wide = torch.promote_types(torch.promote_types(found.dtype, expected.dtype), torch.float32)
    found, expected = found.to(wide), expected.to(wide)
    return bool(((found - expected).norm(dim=-1) <= _ROUNDING * expected.norm(dim=-1)).all())


CONTRIBUTIONS: dict[Kind, type[Contribution]] = {
    "linear": LinearContribution,
    "conv1d": Conv1DContribution,
    "embedding": EmbeddingContribution,
    "layer_norm": NormContribution,
    "rms_norm": NormContribution,
}
