"""Recognise the modules whose weight gradient can be written down from input and output gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from passk_guard.sketch.norms import is_rms_norm

Kind = Literal["linear", "conv1d", "embedding", "layer_norm", "rms_norm"]


@dataclass(frozen=True)
class Use:
    """One covered module, with the names under which its trainable parameters are sketched.

    A tied weight has one name and several uses: that is what makes its contributions add as vectors.
    """

    module: nn.Module
    kind: Kind
    weight: str | None
    bias: str | None


def kind_of(module: nn.Module) -> Kind | None:
    """The rule that gives the module's parameter gradients, or None where no rule is known.

    A subclass that overrides `forward` computes something else, so it is not taken for its parent.
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
    return "rms_norm" if is_rms_norm(module) else None


def _is_plain_embedding(module: nn.Embedding) -> bool:
    if module.scale_grad_by_freq or module.max_norm is not None:
        return False
    # Gemma multiplies the looked-up rows by `embed_scale`; the hook multiplies the gradient by it.
    scaled = type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")
    return scaled or type(module).forward is nn.Embedding.forward


def find_uses(model: nn.Module, trainable: dict[int, str]) -> list[Use]:
    """All covered modules that hold a trainable parameter.

    Args:
        model: any module.
        trainable: id of each trainable parameter -> its name.
    """
    uses = []
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        weight, bias = (trainable.get(id(own.get(key))) for key in ("weight", "bias"))
        kind = kind_of(module) if weight or bias else None
        if kind is not None:
            uses.append(Use(module, kind, weight, bias))
    return uses
