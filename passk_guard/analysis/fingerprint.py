"""Whether two runs looked at the same model and the same prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def model_fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits from the model's config and from every parameter and buffer: name, dtype, shape, bytes.

    Of the loaded model and not of its files, so that it covers adapters and the dtype it was loaded in, and serves a
    model that never was on disk. About a second for a gigabyte.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        digest.update(_canonical(_without_places(config.to_dict())))
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def keys_fingerprint(keys: Sequence[str]) -> str:
    """32 hexadecimal digits from the keys of the prompts, in order."""
    return hashlib.blake2b(_canonical(list(keys)), digest_size=16).hexdigest()


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    # Where a model was loaded from, and by which version, does not change what it computes.
    return {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=repr).encode()


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
