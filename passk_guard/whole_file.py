"""Writing a file of tensors whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from passk_guard.own_file import replacing


def save_whole(content: Any, path: Path) -> None:
    """`torch.save` under another name, then renamed; on a full disk nothing is left of it, and an older file stays.

    Raises:
        OSError, RuntimeError: it cannot be written; torch reports a full disk as a RuntimeError.
    """
    with replacing(path, path.with_name(path.name + ".partial")) as partial:
        torch.save(content, partial)
