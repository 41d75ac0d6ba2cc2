"""Normalised inputs of LayerNorm and RMSNorm, from which the gradients of their weights follow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")


def is_rms_norm(module: nn.Module) -> bool:
    """True for nn.RMSNorm and for classes named *RMSNorm that hold one 1-D weight.

    The name is a guess only: `scales_normalised_input` checks the formula on each pass.
    """
    own = dict(module.named_parameters())
    return "RMSNorm" in type(module).__name__ and list(own) == ["weight"] and own["weight"].dim() == 1


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


def scales_normalised_input(module: nn.Module, x: Tensor, output: Tensor) -> bool:
    """Whether the output is x_hat * weight, or x_hat * (1 + weight) as in Gemma, at one token of the batch.

    Gated and offset variants fail here, and are then reported as not covered rather than sketched wrongly.
    """
    if module.get_parameter("weight").numel() != x.shape[-1]:
        return True  # sharded away again (ZeRO-3) by the time a hook runs: the name has to do
    token = (0,) * (x.dim() - 1)
    x_hat, found = normalised_input(module, x[token]), output[token]
    weight = module.get_parameter("weight").to(x_hat.dtype)
    found = found.to(x_hat.dtype)
    atol = 4 * torch.finfo(output.dtype).eps * float(found.abs().max() + 1)
    return any(torch.allclose(x_hat * scale, found, rtol=0.02, atol=atol) for scale in (weight, 1 + weight))
