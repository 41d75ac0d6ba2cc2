"""What a probe must be before anything is estimated from it. Needs torch alone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from passk_guard.estimation.records import ProbeGram
from passk_guard.utils.arguments import as_counts
from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import brief

_ROWS = 64
_SMALLEST = 1e-60  # the jackknife takes fourth powers of the entries


def checked_probe(probe: ProbeGram, k: int) -> ProbeGram:
    """The probe in int64 and float64 on the CPU. Everything but k is checked once for each probe.

    Raises:
        GuardError: shapes that do not fit, counts that are not whole or out of range, n < k; a matrix that is not
            finite, not symmetric, against the Cauchy-Schwarz inequality, or of numbers whose products float64 cannot
            hold; `misses` of another shape or negative.
    """
    probe = probe.converted(*probe.keep("checked", lambda: _checked(probe)))
    fewest = int(probe.num_samples.min())
    if not isinstance(k, int) or not 1 <= k <= fewest:
        raise GuardError(
            f"Expected `num_samples` >= k >= 1; found num_samples={fewest}, k={k}. Raise `num_samples` or lower `k`."
        )
    return probe


def _checked(probe: ProbeGram) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gram matrix, counts and misses."""
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
    if bool(((c < 0) | (c > n)).any()):
        raise GuardError("Expected 0 <= `num_correct` <= `num_samples`; found a count outside.")
    _check_matrix(gram)
    keys = probe.prompt_keys
    if not isinstance(keys, Sequence) or len(keys) not in (0, m) or not all(isinstance(key, Hashable) for key in keys):
        raise GuardError(f"Expected no `prompt_keys` or a list of {m} that can be hashed; found {brief(keys)}.")
    return gram, n, c, None if probe.misses is None else _checked_misses(probe.misses, n)


def _check_matrix(gram: Tensor) -> None:
    low, high = (float(x) for x in gram.aminmax())  # NaN comes through
    if not (math.isfinite(low) and math.isfinite(high)):
        raise GuardError("Expected a finite Gram matrix; found NaN or infinity. Leave this refresh out.")
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


def _symmetric(gram: Tensor, atol: float) -> bool:
    """Up to rounding, some rows at a time: copies of a whole Gram matrix would double the memory of an estimate."""
    rows, columns = gram.split(_ROWS), gram.T.split(_ROWS)
    return all(torch.allclose(a, b, rtol=1e-4, atol=atol) for a, b in zip(rows, columns, strict=True))


def _possible(gram: Tensor, atol: float) -> bool:
    """Cauchy-Schwarz for every pair of rows, up to rounding, in O(m^2)."""
    diagonal = gram.diagonal()
    if bool((diagonal < -atol).any()):
        return False
    length = diagonal.clamp(min=0).sqrt()
    parts = zip(gram.split(_ROWS), length.split(_ROWS), strict=True)
    return all(bool((rows.abs() <= 1.001 * own[:, None] * length + atol).all()) for rows, own in parts)


def _checked_misses(misses: Tensor, n: Tensor) -> Tensor:
    misses, shape = _real(misses, "misses"), (n.numel(), int(n.max()))
    if misses.shape != shape:
        raise GuardError(
            f"Expected `misses` of shape {shape}, prompts by samples; found {tuple(misses.shape)}. Pass what "
            "`importance.miss_estimates` gives for these samples, or None for fresh ones."
        )
    if not bool(((misses >= 0) & misses.isfinite()).all()):
        raise GuardError("Expected `misses` to be finite and not negative; found others. Resample this probe.")
    return misses


def _real(value: Any, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise GuardError(f"Expected `{name}` to be a tensor of real numbers; found {brief(value)}.") from None
    if tensor.is_complex():
        raise GuardError(f"Expected `{name}` to be real; found {tensor.dtype}.")
    return tensor.detach().cpu().double()
