"""From the output folders of runs to their page, in Python and in notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from passk_guard.change import missed_in_words
from passk_guard.reporting.html.page import in_a_frame, render_page, save_page
from passk_guard.reporting.journal import RunJournal, read_journal
from passk_guard.reporting.run_charts import (
    Run,
    cosine_chart,
    number,
    rate_charts,
    single_chart,
    state_of,
    verdict_chart,
)

KIND = "run report"
PAGE_NAME = "passk_guard.html"
_STEPS = ("steps",)
_CHANGE = (
    ("pass_at_1_total", "Change of pass@1 since the start{missed}", "pass@1", None, ("change",)),
    ("pass_at_{k}_total", "Change of pass@{k} since the start{missed}", "pass@{k}", None, ("change",)),
    ("effective_samples", "Effective share of the samples", "share", (0.0, 1.0), ("change",)),
)
_MITIGATION = (
    ("train_cosine", "Training gradient and protected direction, before", "cosine", None, _STEPS),
    ("protected_reliability", "Share of the protected direction that is no noise", "share", None, ("refresh",)),
    ("mitigated", "Share of steps that were changed", "share of steps", (0.0, 1.0), _STEPS),
    ("coefficient", "Coefficient of the protected direction", "coefficient", None, _STEPS),
    ("floor", "Floor under the prompt weights", "floor", None, ("refresh", "steps")),
)


def run_page(runs: Sequence[Run]) -> str:
    """The whole page: pass rates, cosine, verdicts, alerts, mitigation, failed refreshes, every refresh, settings."""
    top = float(max((k for run in runs for k in run.ks), default=2))
    interference = (
        ("k_star", "k*: largest k without an established conflict", "k*", (1.0, top)),
        ("agreement", "Mean agreement under the pass@k weights", "agreement"),
        ("frac_negative_pairs", "Share of negative prompt pairs", "share of pairs", (0.0, 1.0)),
    )
    return render_page(
        "run.html.j2",
        "passk_guard: " + " and ".join(run.name for run in runs),
        kind=KIND,
        runs=runs,
        number=number,
        state_of=state_of,
        rates=[*rate_charts(runs), cosine_chart(runs)],
        change_charts=_change_charts(runs),
        verdicts=verdict_chart(runs),
        mitigation=[chart for each in _MITIGATION if (chart := single_chart(runs, *each))],
        step_costs=[(run.name, costs) for run in runs if (costs := run.numbers("mitigation_seconds", "steps"))],
        interference=[chart for each in interference if (chart := single_chart(runs, *each))],
    )


def _change_charts(runs: Sequence[Run]) -> list[Markup]:
    k = next((event["k"] for run in runs for event in run.windows if isinstance(event.get("k"), int)), 0)
    windows = [event for run in runs for event in run.windows]
    missed = missed_in_words(max((int(number(event.get("missed")) or 0) for event in windows), default=0))
    charts = []
    for name, title, label, y_range, kinds in _CHANGE:
        chart = single_chart(
            runs, name.format(k=k), title.format(k=k, missed=missed), label.format(k=k), y_range, kinds
        )
        charts += [chart] if chart else []
    return charts


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
