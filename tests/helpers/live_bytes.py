"""The most bytes of tensors alive at once in a call, counted where they are made.

Resident memory depends on what the allocator keeps, and a test of it fails by chance.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self._seen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before and storage not in self._seen:
                    self._count(storage)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._seen[storage] = True
        size = storage.nbytes()
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.alive -= size


def most_alive(run: Callable[[], object]) -> int:
    """Bytes of the storages made during `run`, at the moment when most of them were alive."""
    with _Counted() as counted:
        run()
    return counted.most
