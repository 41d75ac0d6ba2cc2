"""One forward of a causal language model, to logits."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from passk_guard.utils.errors import GuardError


def forward_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits [B, T, V] of `model(input_ids=..., attention_mask=...)`, without cache and without labels.

    Raises:
        GuardError: the output holds no such logits, or no gradient can flow from them.
    """
    cache = {"use_cache": False} if _accepts(model, "use_cache") else {}
    output = model(input_ids=input_ids, attention_mask=attention_mask, **cache)
    logits = _logits_of(output)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
    if shape is None or len(shape) != 3 or shape[:2] != tuple(input_ids.shape):
        raise GuardError(
            f"Expected logits [{input_ids.shape[0]}, {input_ids.shape[1]}, V] from the model; found "
            f"{type(logits).__name__ if shape is None else list(shape)}. Pass a causal LM whose forward returns "
            "logits: switch off fused heads and losses that skip them."
        )
    if not logits.requires_grad:
        raise GuardError(
            "Expected logits through which a gradient flows; found a detached tensor. Pass a model whose forward "
            "does not run under no_grad or inference_mode."
        )
    return logits


def _logits_of(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else getattr(output, "logits", None)


def _accepts(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
