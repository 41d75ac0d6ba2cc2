"""Random signs and hashes drawn from a seed and a parameter's name: the same on every rank and device."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator_for(seed: int, name: str, part: str) -> torch.Generator:
    """A CPU generator that depends on (seed, name, part) only, and leaves the global ones alone."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{part}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def random_signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent signs -1 or +1 of the given shape, int8, on the CPU."""
    count = 1
    for size in shape:
        count *= size
    # One 64-bit draw gives eight bytes, and the low bit of each is one sign: eight times fewer draws.
    words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(generator=generator)
    return words.view(torch.int8)[:count].bitwise_and_(1).mul_(2).sub_(1).view(shape)


def random_buckets(size: int, dim: int, generator: torch.Generator) -> Tensor:
    """Independent uniform draws from 0..dim-1, [size] int64, on the CPU."""
    return torch.randint(dim, (size,), generator=generator)
