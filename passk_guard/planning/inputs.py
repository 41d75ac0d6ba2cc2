"""What a run or an analysis has left to plan from: its noise, its settings, its costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError

from passk_guard.config import GuardConfig
from passk_guard.estimation.noise import Noise, average_noise, noise_from
from passk_guard.planning.plan import Cost
from passk_guard.reporting.journal import JOURNAL_NAME, Event, RunJournal, read_journal
from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import describe_error

_LONGEST = 1e9  # seconds
ANALYSIS_NAME = "analysis.json"  # `analysis.folder` has it too, and takes seconds to import


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
    """Of the output folder of a run or of an analysis, or of the file itself.

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
        newest: so many refreshes with noise, the last ones; all by default.

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
        noise=average_noise([noise_from(event["noise"]) for event in chosen]),
        config=_config(journal.path, journal.settings),
        cost=Cost(_median(chosen, "probe_seconds"), _median(chosen, "step_seconds")),
        where=_where(journal, chosen),
    )


def past_of_analysis(path: Path) -> Past:
    """Read `analysis.json` for a plan: of a run with the defaults of the guard, and of no known cost.

    Raises:
        GuardError: no analysis that can be read, or one without noise, and what to run.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        settings, noise = data["settings"], data.get("noise")
        known = {name: settings[name] for name in ("num_samples", "threshold", "confidence")}
        k = max(settings["ks"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise GuardError(f"Expected an analysis in {path}; found {describe_error(error)}.") from error
    if not isinstance(noise, dict):
        raise GuardError(
            f"Expected the noise of the probe in {path}; found none: fewer than 4 prompts, none with a gradient, or an "
            "analysis of an earlier version. The command that made it writes it anew without sampling again."
        )
    return Past(average_noise([noise_from(noise)]), _config(path, known | {"k": k}), Cost(), str(path))


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
    try:
        return GuardConfig.from_journal(settings)
    except ValidationError as error:
        raise GuardError(f"Settings in {path}: {error}") from error


def _median(events: Sequence[Event], name: str) -> float | None:
    values = [event[name] for event in events if isinstance(event.get(name), float | int)]
    known = [float(value) for value in values if 0 < value <= _LONGEST]
    return median(known) if known else None
