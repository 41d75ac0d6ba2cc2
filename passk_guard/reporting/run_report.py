"""From the output folders of runs to their page, in Python and in notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passk_guard.reporting.html.axes import write_number
from passk_guard.reporting.html.elements import Html, callout, facts, figures, join, paragraph, tag
from passk_guard.reporting.html.page import Section, in_a_frame, render_page, save_page
from passk_guard.reporting.html.table import Column, table
from passk_guard.reporting.journal import RunJournal, read_journal
from passk_guard.reporting.run_charts import (
    Run,
    alerts,
    cosine_chart,
    floor_chart,
    mean,
    number,
    rate_charts,
    refresh_chart,
    step_chart,
    steps_column,
    verdict_chart,
    verdict_of,
)

# The page of a training run, or of two side by side.


KIND = "run report"

_REFRESH_CHARTS = (
    ("agreement", "Mean agreement under the pass@k weights", "agreement"),
    ("frac_negative_pairs", "Share of negative prompt pairs", "share of pairs", (0.0, 1.0)),
)
_STEP_CHARTS = (
    ("train_cosine", "Training gradient and protected direction, before", "cosine"),
    ("mitigated", "Share of steps that were changed", "share of steps", (0.0, 1.0)),
    ("coefficient", "Coefficient of the protected direction", "coefficient"),
)


def run_page(runs: Sequence[Run]) -> str:
    """The whole page: pass rates, cosine, verdicts, alerts, mitigation, void refreshes, every refresh, settings."""
    title = "passk_guard: " + " and ".join(run.name for run in runs)
    sections = [
        Section("Pass rates and cosine", figures(*rate_charts(runs), cosine_chart(runs)), _NOTE),
        Section("Verdicts and alerts", join([verdict_chart(runs), _alert_table(runs)])),
        *_optional("Mitigation", _mitigation_charts(runs), _step_note(runs)),
        *_optional("Interference", [_k_star_chart(runs), *(refresh_chart(runs, *chart) for chart in _REFRESH_CHARTS)]),
        *_void_section(runs),
        Section("All refreshes", join(_refresh_table(run, runs) for run in runs)),
        *_settings_section(runs),
    ]
    return render_page(title, sections, kind=KIND, lead=join(_summary(run, runs) for run in runs))


_NOTE = (
    "Pass rates of each probe, the cosine over the pooled refreshes. The cosine leads: unguarded it may drift back to "
    "0 after the damage is done, and under the guard it may stay negative. Judge by pass@1 and pass@k."
)


def _summary(run: Run, runs: Sequence[Run]) -> Html:
    low, high = run.last("cosine_ci_low"), run.last("cosine_ci_high")
    interval = "" if low is None or high is None else f" [{write_number(low, 0.01)}, {write_number(high, 0.01)}]"
    found: dict[str, Any] = {
        "last step in the journal": run.journal.events[-1]["step"] if run.journal.events else None,
        "verdict": run.verdict.upper(),
        "newest cosine": f"{write_number(run.last('cosine'), 0.01)}{interval}",
        **{f"pass@{k}": _change(run, f"pass_at_{k}") for k in (1, *run.ks)},
        "refreshes": len(run.journal.of("refresh")),
        "void refreshes": len(run.journal.of("void")),
        "alerts": len(alerts(run)),
    }
    heading = tag("h3", run.name) if len(runs) > 1 else Html()
    return join([heading, facts(found), *_remarks(run)])


def _change(run: Run, name: str) -> str:
    return f"{write_number(run.first(name), 0.001)} → {write_number(run.last(name), 0.001)}"


def _remarks(run: Run) -> list[Html]:
    remarks = []
    if run.journal.unfinished:
        remarks.append(
            callout(
                "The last line of the journal is half written and left out: the run goes on, or it crashed. "
                "This page shows it up to the last whole line."
            )
        )
    if run.journal.restarts:
        at = ", ".join(map(str, run.journal.restarts))
        remarks.append(callout(f"The run began again at step {at}; what it then took again replaces what was before."))
    if not run.held_out:
        remarks.append(callout("The numbers describe the training batch and are not held out."))
    newest = run.refreshes[-1] if run.refreshes else {}
    if newest.get("event") == "void":
        remarks.append(callout(f"The newest refresh is void: {newest.get('reason')}", "bad"))
    return remarks


def _alert_table(runs: Sequence[Run]) -> Html:
    rows = [(*_of(run, runs), step, kind, text) for run in runs for step, kind, text in alerts(run)]
    if not rows:
        return paragraph("No alert: no verdict changed.", note=True)
    columns = [*_run_column(runs), Column("step", "number"), Column("alert"), Column("message")]
    return table(columns, rows, caption="Alerts")


def _optional(heading: str, charts: Sequence[Html | None], note: str = "") -> list[Section]:
    drawn = [chart for chart in charts if chart is not None]
    return [Section(heading, figures(*drawn), note)] if drawn else []


def _mitigation_charts(runs: Sequence[Run]) -> list[Html | None]:
    return [*(step_chart(runs, *chart) for chart in _STEP_CHARTS), floor_chart(runs)]


def _k_star_chart(runs: Sequence[Run]) -> Html | None:
    top = max((k for run in runs for k in run.ks), default=2)
    return refresh_chart(runs, "k_star", "k*: largest k without an established conflict", "k*", (1.0, float(top)))


def _step_note(runs: Sequence[Run]) -> str:
    told = []
    for run in runs:
        seconds = mean(steps_column(run, "mitigation_seconds")[1])
        if seconds is not None:
            told.append(f"{write_number(1000 * seconds)} ms a step" + (f" in {run.name}" if len(runs) > 1 else ""))
    return "Means over the steps between log rows." + (f" It took {', '.join(told)}." if told else "")


def _void_section(runs: Sequence[Run]) -> list[Section]:
    rows = [
        (*_of(run, runs), event["step"], number(event.get("streak")), str(event.get("reason")))
        for run in runs
        for event in run.journal.of("void")
    ]
    if not rows:
        return []
    columns = [*_run_column(runs), Column("step", "number"), Column("in a row", "number"), Column("reason")]
    return [Section("Void refreshes", table(columns, rows, caption="Refreshes without an estimate; training went on"))]


def _refresh_table(run: Run, runs: Sequence[Run]) -> Html:
    rates = [name for k in (1, *run.ks) for name in (f"pass_at_{k}", f"pass_at_{k}_se")]
    numbers = ["cosine", "cosine_ci_low", "cosine_ci_high", *rates, "k_star", "refreshes", "prompts", "informative"]
    columns = [
        Column("step", "number"),
        Column("verdict"),
        *(Column(_heading(name), "number", 0 if name == "k_star" else 3) for name in numbers),
        Column("seconds", "number", 2),
        Column("reason"),
    ]
    rows = [
        (
            event["step"],
            "void" if event["event"] == "void" else verdict_of(event),
            *(number(event.get(name)) for name in (*numbers, "probe_seconds")),
            event.get("reason"),
        )
        for event in run.refreshes
    ]
    return table(columns, rows, caption=f"Refreshes of {run.name}" if len(runs) > 1 else "Refreshes")


def _heading(name: str) -> str:
    known = {"cosine_ci_low": "low", "cosine_ci_high": "high", "k_star": "k*", "informative": "solved sometimes"}
    if name.endswith("_se"):
        return "± s.e."
    return known.get(name, name.replace("pass_at_", "pass@"))


def _settings_section(runs: Sequence[Run]) -> list[Section]:
    names = list(dict.fromkeys(name for run in runs for name in run.journal.settings))
    if not names:
        return []
    rows = [(name, *(_written(run.journal.settings.get(name)) for run in runs)) for name in names]
    columns = [Column("setting"), *(Column(run.name if len(runs) > 1 else "value") for run in runs)]
    return [Section("Settings", table(columns, rows, caption="Settings of the guard"))]


def _written(value: Any) -> str | None:
    return None if value is None else str(value)


def _run_column(runs: Sequence[Run]) -> list[Column]:
    return [Column("run")] if len(runs) > 1 else []


def _of(run: Run, runs: Sequence[Run]) -> tuple[str, ...]:
    return (run.name,) if len(runs) > 1 else ()


PAGE_NAME = "passk_guard.html"


@dataclass(frozen=True)
class RunReport:
    """What `report` found: one run, or two to compare. A notebook shows it as a page.

    Attributes:
        journals: of the runs, in the order given.
    """

    journals: Sequence[RunJournal]

    @property
    def html(self) -> str:
        """The self-contained page."""
        return run_page([Run(n, journal) for n, journal in zip(_names(self.journals), self.journals, strict=True)])

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the page; only a run report is written over unless `force`.

        Raises:
            GuardError: another file is there, or it cannot be written.
        """
        return save_page(self.html, path, kind=KIND, force=force)

    def _repr_html_(self) -> str:
        return in_a_frame(self.html)


def report(run_dir: str | Path, other: str | Path | None = None) -> RunReport:
    """Read the journal of a run, or of two, as they are now; a run that goes on can be read at any time.

    Args:
        run_dir: output folder of a guarded run, with its `passk_guard.jsonl`.
        other: of a second run, drawn over the first.

    Raises:
        GuardError: no such folder, no journal in it, no event in it, or a malformed line, which is named.
    """
    return RunReport([read_journal(folder) for folder in (run_dir, other) if folder is not None])


def _names(journals: Sequence[RunJournal]) -> list[str]:
    """The shortest ends of the folders' paths that tell the runs apart."""
    paths = [journal.path.parent.absolute().resolve().parts for journal in journals]
    depth = next((d for d in range(1, max(map(len, paths)) + 1) if len({p[-d:] for p in paths}) == len(paths)), 0)
    if not depth:  # the same run twice
        return [f"{path[-1]} ({'AB'[i]})" for i, path in enumerate(paths)]
    return ["/".join(path[-depth:]) for path in paths]
