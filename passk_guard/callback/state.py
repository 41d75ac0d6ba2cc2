"""What the guard remembers across a checkpoint: the standing decision and the refreshes that are pooled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch

from passk_guard.estimation.evidence import LARGEST_SCORE, SMALLEST_SCORE, RunEvidence
from passk_guard.estimation.gram import checked_probe
from passk_guard.estimation.records import ProbeGram, Status
from passk_guard.estimation.verdict import DecisionState
from passk_guard.mitigation import FloorState
from passk_guard.utils.checkpoint import listed, mapping, one_of, real, save_whole, whole

FILE_NAME = "passk_guard.pt"
_FORMAT = 1
_STATUSES = get_args(Status)


@dataclass(frozen=True)
class Memory:
    """Everything that the next verdict depends on, immutable.

    Attributes:
        decision: state of the decision.
        history: newest draws, oldest first, each by its newest refresh; at most as many as are pooled.
        voids: void refreshes in a row.
        step: of the newest refresh, void or not; -1 before the first.
        floor: under the prompt weights, where reweighting solves for it.
        evidence: for a conflict, of all refreshes together.
        taken: number of each refresh in `history`, void ones not counted.
    """

    decision: DecisionState = field(default_factory=DecisionState)
    history: tuple[ProbeGram, ...] = ()
    voids: int = 0
    step: int = -1
    floor: FloorState = field(default_factory=FloorState)
    evidence: RunEvidence = field(default_factory=RunEvidence)
    taken: tuple[int, ...] = ()

    def with_refresh(self, probe: ProbeGram, pool: int, step: int) -> Memory:
        """The same with one more refresh, and the streak of void ones ended.

        One that reuses the samples of the refresh before takes its place, so that no sample is pooled twice.
        """
        before = self.history[:-1] if probe.reused else self.history
        taken = (*self.taken[: len(before)], self.taken[-1] + 1 if self.taken else 0)
        return replace(self, history=(*before, probe)[-pool:], taken=taken[-pool:], voids=0, step=step)

    def pooled(self, pool: int) -> tuple[ProbeGram, ...]:
        """The draws that the newest `pool` refreshes looked at: fewer than that many where one served several.

        So the pool reaches back as far as without reuse. As many draws would reach back to policies so old that the
        interval misses the present one (benchmarks/README.md, Reuse).
        """
        looks = zip(self.history, self.taken, strict=True)
        return tuple(probe for probe, number in looks if self.taken[-1] - number < pool)

    def with_floor(self, floor: FloorState) -> Memory:
        """The same with the floor after the newest refresh."""
        return replace(self, floor=floor)

    def with_void(self, step: int) -> Memory:
        """The same with one more void refresh."""
        return replace(self, voids=self.voids + 1, step=step)


def save_memory(memory: Memory, folder: Path) -> None:
    """Write `passk_guard.pt` into a checkpoint folder, whole or not at all.

    Raises:
        OSError, RuntimeError: the folder cannot be written to.
    """
    content = {
        "format": _FORMAT,
        "decision": asdict(memory.decision),
        "voids": memory.voids,
        "step": memory.step,
        "floor": asdict(memory.floor),
        "evidence": asdict(memory.evidence),
        "history": [
            {
                "gram": probe.gram,
                "num_samples": probe.num_samples,
                "num_correct": probe.num_correct,
                "prompt_keys": [str(key) for key in probe.prompt_keys],
            }
            | ({"misses": probe.misses} if probe.reused else {})
            for probe in memory.history
        ],
        "taken": list(memory.taken),
    }
    save_whole(content, folder / FILE_NAME)


def load_memory(folder: Path) -> Memory | None:
    """Read it back; None where the checkpoint is older than the guard, of another format, or damaged.

    Loaded with weights_only: a checkpoint from elsewhere cannot run code.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        return _restored(torch.load(path, weights_only=True, map_location="cpu"))
    except Exception:  # of a damaged file torch raises whatever its reader stumbles over
        return None


def _restored(content: Any) -> Memory:
    """Raises ValueError, KeyError, TypeError or GuardError for what `save_memory` never wrote."""
    content = mapping(content)
    one_of(content.get("format"), _FORMAT)
    decision = mapping(content["decision"])
    floor = mapping(content.get("floor", {}))  # this, the next and `taken` are absent in the first versions
    evidence = mapping(content.get("evidence", {}))
    history = tuple(_probe(mapping(probe)) for probe in listed(content["history"]))
    return Memory(
        decision=DecisionState(
            verdict=one_of(decision["verdict"], *_STATUSES),
            candidate=one_of(decision["candidate"], *_STATUSES, None),
            streak=whole(decision["streak"]),
        ),
        history=history,
        taken=_ascending(listed(content.get("taken", list(range(len(history))))), len(history)),
        voids=whole(content["voids"]),
        step=whole(content["step"], -1),
        floor=FloorState(real(floor.get("floor", 0.0), 0.0), real(floor.get("precision", 0.0), 0.0)),
        evidence=RunEvidence(
            tuple(real(score, SMALLEST_SCORE, LARGEST_SCORE) for score in listed(evidence.get("scores", ()))),
            whole(evidence.get("before", 0)),
        ),
    )


def _ascending(numbers: Sequence[Any], count: int) -> tuple[int, ...]:
    found = tuple(whole(number) for number in numbers)
    if len(found) != count or any(b <= a for a, b in pairwise(found)):
        raise ValueError("an ascending number of each refresh was expected")
    return found


def _probe(content: dict[str, Any]) -> ProbeGram:
    probe = checked_probe(ProbeGram(**content), 1)
    if not all(isinstance(key, str) for key in probe.prompt_keys):
        raise ValueError("keys of prompts were expected")
    return probe
