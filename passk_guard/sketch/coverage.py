"""Which share of the trainable parameters a sketch sees; nothing is left out without a word."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Set
from dataclasses import dataclass

WARN_BELOW = 0.95
_NAMED_IN_WARNING = 5


@dataclass(frozen=True)
class Coverage:
    """Share of the trainable parameters whose gradient enters the sketch.

    Attributes:
        covered: number of trainable scalars that are sketched.
        total: number of trainable scalars; a tied weight counts once.
        share: covered / total, in [0, 1].
        uncovered: names of the parameters left out, largest first.
    """

    covered: int
    total: int
    share: float
    uncovered: tuple[str, ...] = ()


def measure_coverage(sizes: Mapping[str, int], uncovered: Set[str]) -> Coverage:
    """Count what is covered, given the number of scalars of each trainable parameter.

    Args:
        sizes: name of each trainable parameter -> number of scalars.
        uncovered: the names among them that are not sketched.
    """
    total = sum(sizes.values())
    missing = sorted(uncovered & sizes.keys(), key=lambda name: (-sizes[name], name))
    covered = total - sum(sizes[name] for name in missing)
    return Coverage(covered, total, covered / total, tuple(missing))


def warn_if_low(coverage: Coverage, sizes: Mapping[str, int]) -> None:
    """Emit one UserWarning when less than 95% of the trainable scalars are covered."""
    if coverage.share < WARN_BELOW:
        warnings.warn(
            f"The sketch covers {coverage.share:.1%} of the trainable parameters; inner products of score "
            f"vectors miss the rest. Not covered: {_listed(coverage.uncovered, sizes)}. Covered are nn.Linear, "
            "Conv1D, nn.Embedding, LayerNorm and RMSNorm, each called as a module.",
            UserWarning,
            stacklevel=3,
        )


def warn_missed(missed: set[str], sizes: Mapping[str, int]) -> None:
    """Emit one UserWarning that names parameters whose module never took part in a pass."""
    largest_first = sorted(missed, key=lambda name: (-sizes[name], name))
    warnings.warn(
        "These trainable parameters were counted as covered, but the pass bypassed their module or called it "
        f"on something that is not the batch: {_listed(largest_first, sizes)}. Their gradient is missing from "
        "the sketch, in whole or in part. A fused head or kernel that reads the weight directly does this: "
        "switch it off for the guarded model.",
        UserWarning,
        stacklevel=4,
    )


def _listed(names: tuple[str, ...] | list[str], sizes: Mapping[str, int]) -> str:
    shown = ", ".join(f"{name} ({sizes[name]:,})" for name in names[:_NAMED_IN_WARNING])
    rest = len(names) - _NAMED_IN_WARNING
    return shown + (f" and {rest} more" if rest > 0 else "")
