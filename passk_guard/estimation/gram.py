"""What a probe must be before anything is estimated from it. Needs torch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from passk_guard.estimation.records import ProbeGram
from passk_guard.utils.arguments import as_counts
from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import brief

_ROWS = 64
_SMALLEST = 1e-60  # fourth powers of the entries are taken, of the influences of prompts


def checked_probe(probe: ProbeGram, k: int) -> ProbeGram:
    """The probe in int64 and float64 on the CPU.

    Raises:
        GuardError: shapes that do not fit, counts that are not whole or out of range, n < k; a matrix that is not
            finite, not symmetric, against the Cauchy-Schwarz inequality, or of numbers whose products float64 cannot
            hold; `misses` of another shape or negative.
    """
    n = as_counts(probe.num_samples, "num_samples").cpu().to(torch.int64)
    c = as_counts(probe.num_correct, "num_correct").cpu().to(torch.int64)
    gram = _real(probe.gram, "gram")
    m = n.numel()
    if n.ndim != 1 or c.shape != n.shape or gram.shape != (2 * m, 2 * m):
        raise GuardError(
            "Expected `num_samples` [m], `num_correct` [m] and `gram` [2m, 2m]; found "
            f"{tuple(n.shape)}, {tuple(c.shape)} and {tuple(gram.shape)}."
        )
    if m == 0:
        raise GuardError("Expected at least one prompt; found an empty Gram matrix.")
    if not isinstance(k, int) or k < 1 or int(n.min()) < k:
        raise GuardError(
            f"Expected `num_samples` >= k >= 1; found num_samples={int(n.min())}, k={k}. "
            "Raise `num_samples` or lower `k`."
        )
    if bool(((c < 0) | (c > n)).any()):
        raise GuardError("Expected 0 <= `num_correct` <= `num_samples`; found a count outside.")
    low, high = (float(x) for x in gram.aminmax())  # NaN comes through
    if not (math.isfinite(low) and math.isfinite(high)):
        raise GuardError("Expected a finite Gram matrix; found NaN or infinity. Void this refresh.")
    largest = max(high, -low)
    if largest and not _SMALLEST <= largest <= 1 / _SMALLEST:
        raise GuardError(
            f"Expected a Gram matrix with a largest entry of {_SMALLEST:g} to {1 / _SMALLEST:g}; found {largest:.3g}: "
            "products of such numbers are beyond float64. Scale the scores."
        )
    if not _symmetric(gram, atol=1e-6 * largest):
        raise GuardError("Expected a symmetric Gram matrix, S @ S.T of the 2m score sums; found an asymmetric one.")
    if not _possible(gram, atol=1e-6 * largest):
        raise GuardError(
            "Expected a Gram matrix, S @ S.T of the 2m score sums; found an entry <a, b> above |a||b|, or a negative "
            "diagonal. Are the 2m rows in the order S+_1..S+_m, S-_1..S-_m?"
        )
    if not isinstance(probe.prompt_keys, Sequence) or len(probe.prompt_keys) not in (0, m) or not _hashable(probe):
        raise GuardError(
            f"Expected no `prompt_keys` or a list of {m} that can be hashed; found {brief(probe.prompt_keys)}."
        )
    return ProbeGram(gram, n, c, probe.prompt_keys, _checked_misses(probe.misses, n))


def _checked_misses(misses: Tensor | None, n: Tensor) -> Tensor | None:
    if misses is None:
        return None
    misses, shape = _real(misses, "misses"), (n.numel(), int(n.max()))
    if misses.shape != shape:
        raise GuardError(
            f"Expected `misses` of shape {shape}, prompts by samples; found {tuple(misses.shape)}. Pass what "
            "`importance.miss_estimates` gives for these samples, or None for fresh ones."
        )
    if not bool(((misses >= 0) & misses.isfinite()).all()):
        raise GuardError("Expected `misses` to be finite and not negative; found others. Sample this probe afresh.")
    return misses


def _symmetric(gram: Tensor, atol: float) -> bool:
    """Up to rounding, some rows at a time: copies of a whole Gram matrix would be what an estimate costs."""
    rows, columns = gram.split(_ROWS), gram.T.split(_ROWS)
    return all(torch.allclose(a, b, rtol=1e-4, atol=atol) for a, b in zip(rows, columns, strict=True))


def _hashable(probe: ProbeGram) -> bool:
    try:
        return len({hash(key) for key in probe.prompt_keys}) >= 0
    except TypeError:
        return False


def _possible(gram: Tensor, atol: float) -> bool:
    """Cauchy-Schwarz for every pair of rows, up to rounding: what a sum of squares cannot be is found in O(m^2)."""
    diagonal = gram.diagonal()
    if bool((diagonal < -atol).any()):
        return False
    length = diagonal.clamp(min=0).sqrt()
    parts = zip(gram.split(_ROWS), length.split(_ROWS), strict=True)
    return all(bool((rows.abs() <= 1.001 * own[:, None] * length + atol).all()) for rows, own in parts)


def _real(value: Any, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise GuardError(f"Expected `{name}` to be a tensor of real numbers; found {brief(value)}.") from None
    if tensor.is_complex():
        raise GuardError(f"Expected `{name}` to be real; found {tensor.dtype}.")
    return tensor.detach().cpu().double()
