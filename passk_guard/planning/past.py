"""What the journal of a run holds to plan from: its noise, its settings, its costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pydantic import ValidationError

from passk_guard.config import GuardConfig
from passk_guard.errors import GuardError
from passk_guard.journal_file import Event, RunJournal
from passk_guard.noise import Noise, average_noise, noise_from
from passk_guard.planning.plan import Cost


@dataclass(frozen=True)
class Past:
    """A run, as far as a plan needs it.

    Attributes:
        noise: on average over its refreshes.
        config: its settings.
        cost: medians over those refreshes.
        first, last: their steps.
    """

    noise: Noise
    config: GuardConfig
    cost: Cost
    first: int
    last: int


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
        config=_settings(journal),
        cost=Cost(_median(chosen, "probe_seconds"), _median(chosen, "step_seconds")),
        first=chosen[0]["step"],
        last=chosen[-1]["step"],
    )


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


def _settings(journal: RunJournal) -> GuardConfig:
    known = {name: journal.settings[name] for name in GuardConfig.__dataclass_fields__ if name in journal.settings}
    try:
        return GuardConfig(**known)
    except ValidationError as error:
        raise GuardError(f"Settings in {journal.path}: {error}") from error


def _median(events: Sequence[Event], name: str) -> float | None:
    values = [event[name] for event in events if isinstance(event.get(name), float | int)]
    known = [float(value) for value in values if math.isfinite(value) and value > 0]
    return median(known) if known else None
