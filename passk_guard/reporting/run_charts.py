"""The pictures of a run, or of two over each other: colour tells the quantity, dashes and shapes the run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from passk_guard.reporting.html.axes import is_number, write_number
from passk_guard.reporting.html.charts import Band, Series, line_chart
from passk_guard.reporting.html.elements import Html
from passk_guard.reporting.html.frame import Level, Upright
from passk_guard.reporting.html.timeline import Look, Span, timeline
from passk_guard.reporting.journal import Event, RunJournal

# From the events of a journal to the columns that are drawn: numbers or None, spans of verdicts, the alerts.


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
    after = number(run.journal.settings.get("failed_refresh_alert")) or 3  # the default of GuardConfig
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


LOOKS = {
    "conflict": Look(colour=1),
    "clear": Look(colour=2, height=0.4),
    "undetermined": Look(colour=5, height=0.7, filled=False),
    "void refresh": Look(colour=5, height=0.25, filled=False, dash=2),
}
_MOST_MARKS = 12  # vertical lines of one run; a verdict that flips more often is read from the timeline


def rate_charts(runs: Sequence[Run]) -> list[Html]:
    """Pass rates with their standard errors: one picture of one run, one for each k of two."""
    ks = [1, *sorted({k for run in runs for k in run.ks})]
    groups = [ks] if len(runs) == 1 else [[k] for k in ks]
    return [_rates(runs, group, ks) for group in groups]


def cosine_chart(runs: Sequence[Run]) -> Html:
    """cos(grad J_k, grad J_1) with its interval and the threshold; no curve where the probe does not determine it."""
    series = [Series(_named("cosine", run, runs), run.steps, run.column("cosine"), i, i) for i, run in enumerate(runs)]
    bands = [
        Band(
            run.steps,
            run.column("cosine_ci_low"),
            run.column("cosine_ci_high"),
            _named(f"{100 * run.confidence:g}% interval", run, runs),
            i,
        )
        for i, run in enumerate(runs)
    ]
    told = [f"{_named('the cosine', run, runs)} {_span(run.column('cosine'))}" for run in runs]
    return line_chart(
        series,
        bands,
        _marks(runs),
        x_label="step",
        y_label="cosine",
        alt="; ".join(told) + ". Gaps: undetermined.",
        title="cos(pass@1 gradient, pass@k gradient)",
        levels=[Level(t, f"threshold {write_number(t)}") for t in sorted({run.threshold for run in runs})],
        y_range=(-1.0, 1.0),
    )


def refresh_chart(
    runs: Sequence[Run], name: str, title: str, y_label: str, y_range: tuple[float, float] | None = None
) -> Html | None:
    """One number of the refreshes; None where no run has it."""
    columns = [(run.steps, run.column(name)) for run in runs]
    return _single(runs, columns, title, y_label, y_range)


def step_chart(
    runs: Sequence[Run], name: str, title: str, y_label: str, y_range: tuple[float, float] | None = None
) -> Html | None:
    """One number of the guarded steps; None where no run has it."""
    columns: list[tuple[list[int], list[float | None]]] = [steps_column(run, name) for run in runs]
    return _single(runs, columns, title, y_label, y_range)


def floor_chart(runs: Sequence[Run]) -> Html | None:
    """The floor under the prompt weights; None where no run reweights."""
    return _single(runs, [floor_column(run) for run in runs], "Floor under the prompt weights", "floor", None)


def verdict_chart(runs: Sequence[Run]) -> Html:
    """The standing verdict from refresh to refresh."""
    lanes = {_named("verdict", run, runs): verdict_spans(run) for run in runs}
    present = {span.state for lane in lanes.values() for span in lane}
    told = []
    for name, lane in lanes.items():
        counts = [f"{n} {state}" for state in LOOKS if (n := sum(span.state == state for span in lane))]
        told.append(f"{name}: {', '.join(counts)}")
    looks = {state: look for state, look in LOOKS.items() if state in present}
    return timeline(lanes, looks, x_label="step", alt="Refreshes by state. " + "; ".join(told), title="Verdict")


def _rates(runs: Sequence[Run], group: Sequence[int], ks: Sequence[int]) -> Html:
    series, bands, told = [], [], []
    for i, run in enumerate(runs):
        for k in group:
            colour, name = ks.index(k), f"pass_at_{k}"
            rates, errors = run.column(name), run.column(f"{name}_se")
            dash = colour if len(runs) == 1 else i
            series.append(Series(_named(f"pass@{k}", run, runs), run.steps, rates, colour, dash))
            bands.append(_error_band(run.steps, rates, errors, colour))
            told.append(f"{_named(f'pass@{k}', run, runs)} {_span(rates)}")
    title = ", ".join(f"pass@{k}" for k in group)
    alt = "; ".join(told)
    return line_chart(series, bands, _marks(runs), x_label="step", y_label="pass rate", alt=alt, title=title)


def _error_band(
    steps: Sequence[int], rates: Sequence[float | None], errors: Sequence[float | None], colour: int
) -> Band:
    pairs = [(None, None) if r is None or e is None else (r - e, r + e) for r, e in zip(rates, errors, strict=True)]
    return Band(steps, [low for low, _ in pairs], [high for _, high in pairs], "± 1 standard error", colour)


def _single(
    runs: Sequence[Run],
    columns: Sequence[tuple[list[int], list[float | None]]],
    title: str,
    y_label: str,
    y_range: tuple[float, float] | None,
) -> Html | None:
    series, told = [], []
    for i, (run, (steps, values)) in enumerate(zip(runs, columns, strict=True)):
        if mean(values) is not None:
            series.append(Series(_named(y_label, run, runs), steps, values, i, i))
            told.append(f"{_named(y_label, run, runs)} {_span(values)}")
    if not series:
        return None
    return line_chart(series, x_label="step", y_label=y_label, alt="; ".join(told), title=title, y_range=y_range)


def _marks(runs: Sequence[Run]) -> list[Upright]:
    looks = {"CONFLICT": 1, "CLEAR": 2, "BLIND": 3}
    marks = []
    for i, run in enumerate(runs):
        for step, kind, text in alerts(run)[:_MOST_MARKS]:
            label = _named(f"alert: {kind}", run, runs)
            marks.append(
                Upright(step, label, looks.get(kind, 5), dash=2 if i == 0 else 3, title=f"step {step}: {text}")
            )
    return marks


def _named(what: str, run: Run, runs: Sequence[Run]) -> str:
    return what if len(runs) == 1 else f"{what}, {run.name}"


def _span(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "is undetermined throughout"
    return f"from {write_number(known[0])} to {write_number(known[-1])}, between {_ends(known)}"


def _ends(known: Sequence[float]) -> str:
    return f"{write_number(min(known))} and {write_number(max(known))}"
