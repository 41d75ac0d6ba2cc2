"""The noise, settings and costs of a run or an analysis, read back to plan from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator

from passk_guard.config import GuardConfig
from passk_guard.estimation.power import Noise, average_noise
from passk_guard.planning.plan import Cost
from passk_guard.reporting.journal import JOURNAL_NAME, Event, RunJournal, read_journal
from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import describe_error, describe_invalid

_LONGEST = 1e9  # seconds
ANALYSIS_NAME = "analysis.json"

# Products of two such numbers are finite.
Real = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e150, le=1e150)]
Three = Annotated[list[Real], Field(min_length=3, max_length=3)]
Matrix = Annotated[list[Three], Field(min_length=3, max_length=3)]
Natural = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]


class _NoiseRecord(BaseModel):
    """The noise of one refresh as `Noise.to_dict` writes it."""

    prompts: Annotated[Natural, Field(ge=4, le=10_000_000)]
    value: Three
    linear: Matrix
    degenerate: Matrix
    degrees: Annotated[Real, Field(ge=1)]
    solved: Natural
    failed: Natural

    @model_validator(mode="after")
    def _shares(self) -> _NoiseRecord:
        if self.solved + self.failed > 1.001:
            raise ValueError(f"solved={self.solved:g} and failed={self.failed:g} are more than all prompts")
        return self


class _AnalysisSettings(BaseModel):
    ks: Annotated[list[Annotated[int, Field(strict=True)]], Field(min_length=1)]
    num_samples: Any
    threshold: Any
    confidence: Any


class _AnalysisRecord(BaseModel):
    """What a plan needs of `analysis.json`. `GuardConfig` checks the numbers."""

    settings: _AnalysisSettings
    noise: dict[str, Any] | None = None


def read_noise(data: Mapping[str, Any]) -> Noise:
    """The inverse of `Noise.to_dict` for one refresh, also after JSON.

    Raises:
        GuardError: fields that are missing, or that hold anything but finite numbers in the right shapes.
    """
    try:
        values = _NoiseRecord.model_validate(dict(data)).model_dump()
    except ValidationError as error:
        raise GuardError(
            f"Expected the noise of a refresh as a run writes it; found {describe_invalid(error)}."
        ) from None
    tensors = {name: torch.tensor(values[name], dtype=torch.float64) for name in ("value", "linear", "degenerate")}
    return Noise(refreshes=1, **values | tensors)


@dataclass(frozen=True)
class Past:
    """A run or an analysis, as far as a plan needs it.

    Attributes:
        noise: on average over its refreshes.
        config: its settings.
        cost: medians over those refreshes.
        where: in words, what the noise was measured in.
    """

    noise: Noise
    config: GuardConfig
    cost: Cost
    where: str


def read_past(folder: Path, newest: int | None = None) -> Past:
    """Read the output folder of a run or of an analysis, or the file itself.

    Raises:
        GuardError: as `past_of` or `past_of_analysis`, or nothing there.
    """
    analysis = folder / ANALYSIS_NAME if folder.is_dir() else folder
    if analysis.name == ANALYSIS_NAME and analysis.exists() and not (folder / JOURNAL_NAME).exists():
        return past_of_analysis(analysis)
    return past_of(read_journal(folder), newest)


def past_of(journal: RunJournal, newest: int | None = None) -> Past:
    """Read a journal for a plan.

    Args:
        journal: of the run.
        newest: how many of the last refreshes with noise to use; all by default.

    Raises:
        GuardError: no refresh with noise, and what to run; settings or noise that no run writes.
    """
    if newest is not None and newest < 1:
        raise GuardError(f"Expected at least 1 refresh to plan from; found {newest}.")
    events = journal.of("refresh")
    measured = [event for event in events if isinstance(event.get("noise"), dict)]
    if not measured:
        raise GuardError(_nothing(journal, events))
    chosen = measured[-newest:] if newest else measured
    return Past(
        noise=average_noise([read_noise(event["noise"]) for event in chosen]),
        config=_config(journal.path, journal.settings),
        cost=Cost(_median(chosen, "probe_seconds"), _median(chosen, "step_seconds"), _cadence(chosen)),
        where=_where(journal, chosen),
    )


def past_of_analysis(path: Path) -> Past:
    """Read `analysis.json` for a plan of a run with the guard's defaults and unknown cost.

    Raises:
        GuardError: no analysis that can be read, or one without noise, and what to run.
    """
    try:
        record = _AnalysisRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise GuardError(f"Expected an analysis in {path}; found {describe_invalid(error)}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise GuardError(f"Expected an analysis in {path}; found {describe_error(error)}.") from error
    if record.noise is None:
        raise GuardError(
            f"Expected the noise of the probe in {path}; found none: fewer than 4 prompts, none with a gradient, or an "
            "analysis of an earlier version. The command that made it writes it again without sampling again."
        )
    settings = record.settings.model_dump(exclude={"ks"}) | {"k": max(record.settings.ks)}
    return Past(average_noise([read_noise(record.noise)]), _config(path, settings), Cost(), str(path))


def _where(journal: RunJournal, events: Sequence[Event]) -> str:
    first, last = events[0]["step"], events[-1]["step"]
    if first == last:
        return f"{journal.path.parent}, 1 refresh, step {first}"
    return f"{journal.path.parent}, {len(events)} refreshes, steps {first} to {last}"


def _nothing(journal: RunJournal, events: Sequence[Event]) -> str:
    if not events:
        return f"Expected a refresh with an estimate in {journal.path}; found none yet. Plan again after the first."
    if any("noise" in event for event in events):
        return (
            f"Expected a refresh with a gradient in {journal.path}; in all {len(events)} every prompt was always or "
            "never solved. Choose prompts the model solves sometimes, and run the guard again for a few refreshes."
        )
    return (
        f"Expected the noise of each refresh in {journal.path}; found none in {len(events)}: the run is of an earlier "
        "version. Run the guard again for `pool_refreshes` refreshes or more; it changes nothing in training."
    )


def _config(path: Path, settings: Mapping[str, Any]) -> GuardConfig:
    """The settings that this version knows."""
    try:
        return GuardConfig.from_journal(settings)
    except ValidationError as error:
        raise GuardError(f"Settings in {path}: {error}") from error


def _cadence(events: Sequence[Event]) -> float | None:
    """Steps between two of these refreshes, in the median."""
    gaps = [later["step"] - earlier["step"] for earlier, later in pairwise(events)]
    return float(median(gaps)) if gaps else None


def _median(events: Sequence[Event], name: str) -> float | None:
    values = [event[name] for event in events if isinstance(event.get(name), float | int)]
    known = [float(value) for value in values if 0 < value <= _LONGEST]
    return median(known) if known else None
