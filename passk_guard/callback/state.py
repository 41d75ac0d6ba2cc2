"""What the guard remembers across a checkpoint: the standing decision and the refreshes that are pooled."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StrictStr, model_validator
from torch import Tensor

from passk_guard.callback.budget import Account
from passk_guard.callback.realised import ChangeMemory
from passk_guard.estimation.evidence import Check, RunEvidence
from passk_guard.estimation.gram import checked_probe
from passk_guard.estimation.records import ProbeGram, Status
from passk_guard.estimation.verdict import DecisionState
from passk_guard.mitigation import FloorState, HoldState
from passk_guard.reporting.journal import RUN
from passk_guard.utils.files import save_whole

FILE_NAME = "passk_guard.pt"
_FORMAT = 1


@dataclass(frozen=True)
class Memory:
    """Everything that the next verdict depends on, immutable.

    Attributes:
        decision: state of the decision.
        history: newest samples, oldest first, each in its newest refresh; at most as many as are pooled.
        failures: failed refreshes in a row.
        step: of the newest refresh, failed or not; -1 before the first.
        floor: under the prompt weights, where reweighting solves for it.
        evidence: for a conflict, of all refreshes together.
        taken: number of each refresh in `history`, failed ones not counted.
        floor_before: that of the refresh before, which no sample of the newest has steered.
        change: what the windows of the realised change add up to.
        account: work of the run and of its probe.
        run: identity of the run; empty in checkpoints of the first versions.
        pass_tokens: most tokens of one pass of the probe, which a resumed run keeps to; 0: not chosen yet.
        hold: of the multiplier that holds pass@1; None before the first refresh, and where nothing does.
    """

    decision: DecisionState = field(default_factory=DecisionState)
    history: tuple[ProbeGram, ...] = ()
    failures: int = 0
    step: int = -1
    floor: FloorState = field(default_factory=FloorState)
    evidence: RunEvidence = field(default_factory=RunEvidence)
    taken: tuple[int, ...] = ()
    floor_before: FloorState = field(default_factory=FloorState)
    change: ChangeMemory = field(default_factory=ChangeMemory)
    account: Account = field(default_factory=Account)
    run: str = ""
    pass_tokens: int = 0
    hold: HoldState | None = None

    @property
    def status(self) -> float:
        """One number for a tracker's own alert: 3 LOSING, 2 CONFLICT, 1 CLEAR, HOLDING or GAINING, 0 undetermined."""
        if self.change.outcome.outcome == "losing":
            return 3.0
        if self.decision.verdict == "conflict":
            return 2.0
        return float(self.decision.verdict == "clear" or self.change.outcome.outcome in ("holding", "gaining"))

    def with_refresh(self, probe: ProbeGram, pool: int, step: int) -> Memory:
        """Add one refresh, which ends a streak of failures.

        A refresh that reuses the samples of the one before replaces it, so that no sample is pooled twice.
        """
        before = self.history[:-1] if probe.reused else self.history
        taken = (*self.taken[: len(before)], self.taken[-1] + 1 if self.taken else 0)
        return replace(self, history=(*before, probe)[-pool:], taken=taken[-pool:], failures=0, step=step)

    def pooled(self, pool: int) -> tuple[ProbeGram, ...]:
        """The samples behind the newest `pool` refreshes: fewer than `pool` where one sample served several.

        So the pool reaches back as far as without reuse. As many samples would reach back to policies so old that the
        interval misses the present one (benchmarks/README.md, Reuse).
        """
        numbered = zip(self.history, self.taken, strict=True)
        return tuple(probe for probe, number in numbered if self.taken[-1] - number < pool)

    def with_floor(self, floor: FloorState) -> Memory:
        """Replace the floor."""
        return replace(self, floor=floor, floor_before=self.floor)

    def with_change(self, change: ChangeMemory) -> Memory:
        """Replace what the windows add up to."""
        return replace(self, change=change)

    def holding(self, metric: str) -> Memory:
        """Hold this from here on; nothing is known of it yet."""
        return replace(self, change=self.change.holding(metric), hold=None)

    def with_step(self, step: int) -> Memory:
        """A refresh without an angle, which ends a streak of failures."""
        return replace(self, failures=0, step=step)

    def with_failure(self, step: int) -> Memory:
        """Count one failed refresh."""
        return replace(self, failures=self.failures + 1, step=step)


def save_memory(memory: Memory, folder: Path) -> None:
    """Write `passk_guard.pt` into a checkpoint folder, whole or not at all.

    Raises:
        OSError, RuntimeError: the folder cannot be written to.
    """
    save_whole({"format": _FORMAT} | asdict(memory), folder / FILE_NAME)


def load_memory(folder: Path) -> Memory | None:
    """Read it back; None where the checkpoint is older than the guard, of another format, or damaged.

    Loaded with weights_only: a checkpoint from elsewhere cannot run code.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        return _Checkpoint.model_validate(content).memory()
    except Exception:  # torch's reader and checked_probe raise whatever a damaged file makes them
        return None


# The form of the file: it may be damaged, or another program's.

_Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_AtLeast0 = Annotated[_Number, Field(ge=0)]


class _Decision(BaseModel):
    verdict: Status
    candidate: Status | None
    streak: _Count


class _Floor(BaseModel):
    floor: _AtLeast0 = 0.0
    precision: _AtLeast0 = 0.0


class _Hold(BaseModel):
    multiplier: _AtLeast0
    trusted: _AtLeast0
    rate: _Number
    change: _Number | None
    multiplier_then: _AtLeast0 | None
    effect: _AtLeast0
    missed: _Count
    cause: StrictStr


class _Account(BaseModel):
    run: _Count
    probe: _Count
    refreshes: _Count
    since: _Count
    due: _Count


class _Check(BaseModel):
    value: _Number
    variance: Annotated[_Number, Field(gt=0)]
    count: Annotated[_Number, Field(ge=1)]
    share: Annotated[_AtLeast0, Field(le=1)] = 0.0
    prompt_variance: _AtLeast0 = 0.0


class _Evidence(BaseModel):
    """The first versions kept `scores`. Their number alone is of use: their share of the allowed error is spent."""

    checks: tuple[_Check, ...] = ()
    before: _Count = 0
    scores: tuple[float, ...] = ()

    def record(self) -> RunEvidence:
        return RunEvidence(tuple(Check(**vars(check)) for check in self.checks), self.before + len(self.scores))


class _Probe(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    gram: Tensor
    num_samples: Tensor
    num_correct: Tensor
    prompt_keys: tuple[StrictStr, ...]
    misses: Tensor | None = None
    corrected: bool = False


class _Checkpoint(BaseModel):
    """`floor` and what follows it are absent in the first versions, which wrote `failures` as `voids`."""

    format: Literal[1]
    decision: _Decision
    history: list[_Probe]
    failures: _Count = Field(validation_alias=AliasChoices("failures", "voids"))
    step: Annotated[int, Field(strict=True, ge=-1, le=2**53)]
    floor: _Floor = Field(default_factory=_Floor)
    evidence: _Evidence = Field(default_factory=_Evidence)
    taken: tuple[_Count, ...] | None = None
    floor_before: _Floor = Field(default_factory=_Floor)
    change: dict[str, Any] | None = None
    account: _Account | None = None
    run: Annotated[StrictStr, Field(pattern=RUN)] = ""
    pass_tokens: _Count = 0
    hold: _Hold | None = None

    @model_validator(mode="after")
    def _refreshes_in_order(self) -> _Checkpoint:
        taken = self.taken
        if taken is not None and (len(taken) != len(self.history) or any(b <= a for a, b in pairwise(taken))):
            raise ValueError("expected an ascending number for each refresh")
        return self

    def memory(self) -> Memory:
        """The records. Raises GuardError for a refresh that is none."""
        return Memory(
            decision=DecisionState(**vars(self.decision)),
            history=tuple(checked_probe(ProbeGram(**vars(probe)), 1) for probe in self.history),
            failures=self.failures,
            step=self.step,
            floor=FloorState(**vars(self.floor)),
            evidence=self.evidence.record(),
            taken=tuple(range(len(self.history))) if self.taken is None else self.taken,
            floor_before=FloorState(**vars(self.floor_before)),
            change=ChangeMemory() if self.change is None else ChangeMemory.restored(self.change),
            account=Account(since=max(0, self.step)) if self.account is None else Account(**vars(self.account)),
            run=self.run,
            pass_tokens=self.pass_tokens,
            hold=None if self.hold is None else HoldState(**vars(self.hold)),
        )
