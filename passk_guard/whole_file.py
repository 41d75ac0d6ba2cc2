"""Writing a file of tensors whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_whole(content: Any, path: Path) -> None:
    """`torch.save` under another name, then renamed; on a full disk nothing is left of it, and an older file stays.

    Raises:
        OSError, RuntimeError: it cannot be written; torch reports a full disk as a RuntimeError.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(content, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
