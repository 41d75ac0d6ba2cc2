"""From the output folders of runs to their page, in Python and in notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from passk_guard.journal_file import RunJournal, read_journal
from passk_guard.pages.document import in_a_frame
from passk_guard.pages.run_numbers import Run
from passk_guard.pages.run_page import KIND, run_page
from passk_guard.pages.saving import save_page

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
