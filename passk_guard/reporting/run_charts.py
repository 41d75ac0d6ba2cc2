"""The pictures of a run, or of two over each other: colour tells the quantity, dashes and shapes the run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from passk_guard.reporting.html.axes import is_number, write_number
from passk_guard.reporting.html.charts import Band, Series, line_chart
from passk_guard.reporting.html.frame import Level, Upright
from passk_guard.reporting.html.timeline import Span, Style, timeline
from passk_guard.reporting.journal import Event, RunJournal

VERDICTS = ("conflict", "clear", "undetermined")
FAILED = "failed refresh"
NO_REFRESH = "NO VALID REFRESH"
STYLES = {
    "conflict": Style(colour=1),
    "clear": Style(colour=2, height=0.4),
    "undetermined": Style(colour=5, height=0.7, filled=False),
    FAILED: Style(colour=5, height=0.25, filled=False, dash=2),
}
_ALERT_COLOURS = {"CONFLICT": 1, "CLEAR": 2, NO_REFRESH: 3}
_MOST_MARKS = 12  # vertical lines of one run; a verdict that flips more often is read from the timeline
Column = list[float | None]
Range = tuple[float, float]


@dataclass(frozen=True)
class Run:
    """A journal with the name it has on the page."""

    name: str
    journal: RunJournal

    @property
    def refreshes(self) -> list[Event]:
        """Refreshes that gave an estimate, and those that failed: a failed one is a gap in every curve."""
        return self.journal.of("refresh", "failed_refresh")

    @property
    def steps(self) -> list[int]:
        """Step of each of the refreshes."""
        return [event["step"] for event in self.refreshes]

    def column(self, name: str) -> Column:
        """A number of each of the refreshes."""
        return [number(event.get(name)) for event in self.refreshes]

    def columns(self, name: str, *kinds: str) -> tuple[list[int], Column]:
        """Steps and values of a number that events of these kinds may hold."""
        events = [event for event in self.journal.of(*kinds) if name in event]
        return [event["step"] for event in events], [number(event[name]) for event in events]

    @property
    def failed(self) -> list[Event]:
        """Refreshes without an estimate."""
        return self.journal.of("failed_refresh")

    @property
    def held_out(self) -> bool:
        """Whether the numbers describe held-out prompts."""
        return all(event.get("held_out", True) for event in self.journal.of("refresh"))

    @property
    def confidence(self) -> float:
        """Of the intervals."""
        return next(iter(self.numbers("confidence")), 0.95)

    @property
    def threshold(self) -> float:
        """Cosine below which there is a conflict; journals without one are of runs with the default."""
        return next(iter(self.numbers("threshold")), number(self.journal.settings.get("threshold")) or 0.0)

    @property
    def ks(self) -> list[int]:
        """Every k > 1 with a pass rate in the journal."""
        names = {name for event in self.journal.of("refresh") for name in event}
        found = {int(match[1]) for name in names if (match := re.fullmatch(r"pass_at_(\d{1,6})", name))}
        return sorted(found - {1})

    def numbers(self, name: str, kind: str = "refresh") -> list[float]:
        """The numbers of this name in events of this kind, those that are not determined left out, oldest first."""
        return [v for event in self.journal.of(kind) if (v := number(event.get(name))) is not None]

    @property
    def verdict(self) -> str:
        """That stands at the end."""
        events = self.journal.of("refresh")
        return verdict_of(events[-1]) if events else "undetermined"

    @property
    def alerts(self) -> list[tuple[int, str, str]]:
        """Those of `changes` that raised an alert."""
        return [change for change in self.changes if change[1] in ("CONFLICT", "LOSING", NO_REFRESH)]

    @property
    def changes(self) -> list[tuple[int, str, str]]:
        """(step, kind, text) of each change of a verdict, and of failed refreshes in a row."""
        after = number(self.journal.settings.get("failed_refresh_alert")) or 3  # the default of GuardConfig
        failed = [e for e in self.failed if e.get("alert", e.get("streak") == after)]
        changes = [
            (e["step"], str(e.get("to", "?")).upper(), e.get("message") or "")
            for e in self.journal.of("state", "outcome")
        ]
        return sorted(changes + [(e["step"], NO_REFRESH, e.get("reason") or "") for e in failed])

    @property
    def windows(self) -> list[Event]:
        """The windows of the realised change."""
        return self.journal.of("change")

    def movers(self, kind: str, most: int = 10) -> list[tuple[int, str, float]]:
        """(step, prompt, change of p) of the prompts that "lost" or "gained" most in any window."""
        found = []
        for event in self.windows:
            pairs = event.get(kind)
            for pair in pairs if isinstance(pairs, list) else []:
                if isinstance(pair, list) and len(pair) == 2 and (change := number(pair[1])) is not None:
                    found.append((event["step"], str(pair[0]), change))
        return sorted(found, key=lambda one: -abs(one[2]))[:most]

    @property
    def by_solve_rate(self) -> list[tuple[str, float]]:
        """Change of pass@1 since the start, of hard, medium and easy prompts."""
        totals = {"hard": 0.0, "medium": 0.0, "easy": 0.0}
        for event in self.windows:
            rates = event.get("solve_rates")
            for name, rate in zip(totals, rates if isinstance(rates, list) else [], strict=False):
                totals[name] += (number(rate.get("pass_at_1")) or 0.0) if isinstance(rate, dict) else 0.0
        return list(totals.items())

    @property
    def spans(self) -> list[Span]:
        """A span from each refresh to the next; the last one is as long as the one before."""
        steps = self.steps
        gap = steps[-1] - steps[-2] if len(steps) > 1 else 1
        ends = [*steps[1:], steps[-1] + gap] if steps else []
        return [
            Span(e["step"], end, state_of(e), f"step {e['step']}: {state_of(e)}. {e.get('reason')}")
            for e, end in zip(self.refreshes, ends, strict=True)
        ]


def number(value: Any) -> float | None:
    """The value where it is a finite number; None else: a journal is a file that anything may have written."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if is_number(value) else None


def verdict_of(event: Event) -> str:
    """The standing verdict after a refresh."""
    verdict = event.get("verdict")
    return verdict if verdict in VERDICTS else "undetermined"


def state_of(event: Event) -> str:
    """The verdict, or that the refresh failed."""
    return FAILED if event["event"] == "failed_refresh" else verdict_of(event)


def rate_charts(runs: Sequence[Run]) -> list[Markup]:
    """Pass rates with their standard errors: one picture of one run, one for each k of two."""
    ks = [1, *sorted({k for run in runs for k in run.ks})]
    groups = [ks] if len(runs) == 1 else [[k] for k in ks]
    return [_rates(runs, group, ks) for group in groups]


def cosine_chart(runs: Sequence[Run]) -> Markup:
    """cos(grad J_k, grad J_1) with its interval and the threshold; no curve where the probe does not determine it."""
    series, bands, alts = [], [], []
    for i, run in enumerate(runs):
        cosine, interval = run.column("cosine"), _named(f"{100 * run.confidence:g}% interval", run, runs)
        series.append(Series(_named("cosine", run, runs), run.steps, cosine, i, i))
        bands.append(Band(run.steps, run.column("cosine_ci_low"), run.column("cosine_ci_high"), interval, i))
        alts.append(f"{_named('the cosine', run, runs)} {_extent(cosine)}")
    return line_chart(
        series,
        bands,
        _marks(runs),
        x_label="step",
        y_label="cosine",
        alt="; ".join(alts) + ". Gaps: undetermined.",
        title="cos(pass@1 gradient, pass@k gradient)",
        levels=[Level(t, f"threshold {write_number(t)}") for t in sorted({run.threshold for run in runs})],
        y_range=(-1.0, 1.0),
    )


def verdict_chart(runs: Sequence[Run]) -> Markup:
    """The standing verdict from refresh to refresh."""
    lanes = {_named("verdict", run, runs): run.spans for run in runs}
    present = {span.state for lane in lanes.values() for span in lane}
    alts = []
    for name, lane in lanes.items():
        counts = [f"{n} {state}" for state in STYLES if (n := sum(span.state == state for span in lane))]
        alts.append(f"{name}: {', '.join(counts)}")
    styles = {state: style for state, style in STYLES.items() if state in present}
    return timeline(lanes, styles, x_label="step", alt="Refreshes by state. " + "; ".join(alts), title="Verdict")


def single_chart(
    runs: Sequence[Run], name: str, title: str, label: str, y_range: Range | None = None, kinds: Sequence[str] = ()
) -> Markup | None:
    """One number of the refreshes, or of events of other `kinds`; None where no run has it."""
    series, alts = [], []
    for i, run in enumerate(runs):
        steps, values = run.columns(name, *kinds) if kinds else (run.steps, run.column(name))
        if any(value is not None for value in values):
            series.append(Series(_named(label, run, runs), steps, values, i, i))
            alts.append(f"{_named(label, run, runs)} {_extent(values)}")
    if not series:
        return None
    return line_chart(series, x_label="step", y_label=label, alt="; ".join(alts), title=title, y_range=y_range)


def _rates(runs: Sequence[Run], group: Sequence[int], ks: Sequence[int]) -> Markup:
    series, bands, alts = [], [], []
    for i, run in enumerate(runs):
        for k in group:
            colour, name = ks.index(k), f"pass_at_{k}"
            rates = run.column(name)
            pairs = list(zip(rates, run.column(f"{name}_se"), strict=True))
            low = [None if rate is None or error is None else rate - error for rate, error in pairs]
            high = [None if rate is None or error is None else rate + error for rate, error in pairs]
            dash = colour if len(runs) == 1 else i
            series.append(Series(_named(f"pass@{k}", run, runs), run.steps, rates, colour, dash))
            bands.append(Band(run.steps, low, high, "± 1 standard error", colour))
            alts.append(f"{_named(f'pass@{k}', run, runs)} {_extent(rates)}")
    title = ", ".join(f"pass@{k}" for k in group)
    return line_chart(
        series, bands, _marks(runs), x_label="step", y_label="pass rate", alt="; ".join(alts), title=title
    )


def _marks(runs: Sequence[Run]) -> list[Upright]:
    return [
        Upright(
            step,
            _named(f"alert: {kind}", run, runs),
            _ALERT_COLOURS.get(kind, 5),
            dash=2 if i == 0 else 3,
            title=f"step {step}: {text}",
        )
        for i, run in enumerate(runs)
        for step, kind, text in run.alerts[:_MOST_MARKS]
    ]


def _named(what: str, run: Run, runs: Sequence[Run]) -> str:
    return what if len(runs) == 1 else f"{what}, {run.name}"


def _extent(values: Column) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "is undetermined throughout"
    first, last, least, most = map(write_number, (known[0], known[-1], min(known), max(known)))
    return f"from {first} to {last}, between {least} and {most}"
