"""From the output folders of runs to their page, in Python and in notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from passk_guard.reporting.html.page import Paged, data_link, render_page
from passk_guard.reporting.html.text import told_apart
from passk_guard.reporting.journal import RunJournal, read_journal
from passk_guard.reporting.run import Run, interval_in_words, names_of, number, state_of
from passk_guard.reporting.run_charts import further_figure, main_figure, who_pays

KIND = "run report"
PAGE_NAME = "passk_guard.html"


def run_page(runs: Sequence[Run]) -> str:
    """The whole page: the run in a sentence, its figures over the steps, who pays, and the tables behind them."""
    return render_page(
        "run.html.j2",
        "passk_guard: " + " and ".join(run.name for run in runs),
        kind=KIND,
        runs=runs,
        number=number,
        state_of=state_of,
        in_words=interval_in_words,
        told_apart=told_apart,
        downloads_of=[
            (
                run,
                data_link(run.csv, "text/csv"),
                data_link({"settings": run.journal.settings, "events": run.journal.events}),
            )
            for run in runs
        ],
        main=main_figure(runs),
        who_pays=who_pays(runs),
        further=further_figure(runs),
        step_costs=[(run.name, costs) for run in runs if (costs := run.numbers("mitigation_seconds", "steps"))],
    )


@dataclass(frozen=True)
class RunReport(Paged):
    """What `report` found: one run, or several to compare. A notebook shows it as a page.

    Attributes:
        journals: of the runs, in the order given.
    """

    journals: Sequence[RunJournal]
    kind = KIND

    @property
    def html(self) -> str:
        """The self-contained page."""
        return run_page([Run(n, journal) for n, journal in zip(names_of(self.journals), self.journals, strict=True)])


def report(run_dir: str | Path, *others: str | Path | None) -> RunReport:
    """Read the journals of runs as they are now; a run that goes on can be read at any time.

    Args:
        run_dir: output folder of a guarded run, with its `passk_guard.jsonl`.
        others: of more runs, drawn over the first.

    Raises:
        GuardError: no such folder, no journal in it, no event in it, or a malformed line, which is named.
    """
    return RunReport([read_journal(folder) for folder in (run_dir, *others) if folder is not None])
