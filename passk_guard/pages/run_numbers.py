"""From the events of a journal to the columns that are drawn: numbers or None, spans of verdicts, the alerts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from passk_guard.journal_file import Event, RunJournal
from passk_guard.pages.axes import is_number
from passk_guard.pages.timeline import Span

VERDICTS = ("conflict", "clear", "undetermined")


@dataclass(frozen=True)
class Run:
    """A journal with the name it has on the page."""

    name: str
    journal: RunJournal

    @property
    def refreshes(self) -> list[Event]:
        """Refreshes that gave an estimate, and those that were void: a void one is a gap in every curve."""
        return self.journal.of("refresh", "void")

    @property
    def steps(self) -> list[int]:
        """Step of each of the refreshes."""
        return [event["step"] for event in self.refreshes]

    def column(self, name: str) -> list[float | None]:
        """A number of each of the refreshes."""
        return [number(event.get(name)) for event in self.refreshes]

    @property
    def held_out(self) -> bool:
        """Whether the numbers describe held-out prompts."""
        return all(event.get("held_out", True) for event in self.journal.of("refresh"))

    @property
    def confidence(self) -> float:
        """Of the intervals."""
        return next((c for e in self.journal.of("refresh") if (c := number(e.get("confidence"))) is not None), 0.95)

    @property
    def threshold(self) -> float:
        """Cosine below which there is a conflict; journals that do not say it are of runs with the default or none."""
        said = [e.get("threshold") for e in self.journal.of("refresh")] + [self.journal.settings.get("threshold")]
        return next((t for value in said if (t := number(value)) is not None), 0.0)

    @property
    def ks(self) -> list[int]:
        """Every k > 1 with a pass rate in the journal."""
        names = {name for event in self.journal.of("refresh") for name in event}
        found = {int(match[1]) for name in names if (match := re.fullmatch(r"pass_at_(\d{1,6})", name))}
        return sorted(found - {1})

    def last(self, name: str) -> float | None:
        """The newest number of this name among the refreshes, None without."""
        return next((v for v in reversed(self.column(name)) if v is not None), None)

    def first(self, name: str) -> float | None:
        """The oldest one."""
        return next((v for v in self.column(name) if v is not None), None)

    @property
    def verdict(self) -> str:
        """That stands at the end."""
        events = self.journal.of("refresh")
        return verdict_of(events[-1]) if events else "undetermined"


def number(value: Any) -> float | None:
    """The value where it is a finite number; None else: a journal is a file that anything may have written."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if is_number(value) else None


def verdict_of(event: Event) -> str:
    """The standing verdict after a refresh."""
    verdict = event.get("verdict")
    return verdict if verdict in VERDICTS else "undetermined"


def verdict_spans(run: Run) -> list[Span]:
    """A span from each refresh to the next; the last one is as long as the one before."""
    events = run.refreshes
    steps = run.steps
    gap = steps[-1] - steps[-2] if len(steps) > 1 else 1
    ends = [*steps[1:], steps[-1] + gap] if steps else []
    return [
        Span(event["step"], end, *_state(event), title=f"step {event['step']}: {_told(event)}")
        for event, end in zip(events, ends, strict=True)
    ]


def alerts(run: Run) -> list[tuple[int, str, str]]:
    """(step, kind, text) of what raised an alert: changes of verdict, and void refreshes in a row."""
    found = [(e["step"], str(e.get("to", "?")).upper(), str(e.get("message", ""))) for e in run.journal.of("state")]
    return sorted(found + [(e["step"], "BLIND", str(e.get("reason", ""))) for e in blind_events(run)])


def blind_events(run: Run) -> list[Event]:
    """Void refreshes that completed a row after which the guard alerts."""
    after = number(run.journal.settings.get("void_alert")) or 3  # the default of GuardConfig
    return [e for e in run.journal.of("void") if e.get("alert", e.get("streak") == after)]


def steps_column(run: Run, name: str) -> tuple[list[int], list[float | None]]:
    """Steps and values of a number that the step guard reports."""
    events = [e for e in run.journal.of("steps") if name in e]
    return [e["step"] for e in events], [number(e[name]) for e in events]


def floor_column(run: Run) -> tuple[list[int], list[float | None]]:
    """Steps and values of the floor under the prompt weights, which a refresh sets."""
    events = [e for e in run.journal.of("refresh", "steps") if "floor" in e]
    return [e["step"] for e in events], [number(e["floor"]) for e in events]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of those there are, None without."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _state(event: Event) -> tuple[str]:
    return ("void refresh",) if event["event"] == "void" else (verdict_of(event),)


def _told(event: Event) -> str:
    return f"void: {event.get('reason')}" if event["event"] == "void" else f"{verdict_of(event)}. {event.get('reason')}"
