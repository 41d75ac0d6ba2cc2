"""A rank's share of the protected direction as it stands in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from passk_guard.utils.checkpoint import floating, listed, mapping, one_of, real, whole


@dataclass(frozen=True)
class Share:
    """This rank's share in a checkpoint, each value of the kind it was saved as."""

    open: bool
    protected: list[Tensor] | None
    on_cpu: list[bool]
    norm_sq: float | None
    sums: dict[str, float]
    measured: int


def share_of(content: dict[str, Any]) -> Share:
    """Raises ValueError, TypeError or KeyError for what `StepGuard.save` never wrote."""
    protected, norm_sq = content["protected"], content.get("norm_sq")
    parts = None if protected is None else [floating(part) for part in listed(protected)]
    on_cpu = [one_of(one, True, False) for one in listed(content["on_cpu"])]
    if len(on_cpu) != len(parts or ()):
        raise ValueError("as many places as parts were expected")
    sums = mapping(content.get("sums", {}))  # this and the next are absent in the first versions
    measured = whole(content.get("measured", 0), 1 if sums else 0)
    return Share(
        open=one_of(content["open"], True, False),
        protected=parts,
        on_cpu=on_cpu,
        norm_sq=None if norm_sq is None else real(norm_sq, 0.0),
        sums={name: real(value) for name, value in sums.items()},
        measured=measured,
    )
