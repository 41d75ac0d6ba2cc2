"""The analysis as tables in a terminal. Prompts go through `plain_text` and never through markup."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from passk_guard.analysis import words
from passk_guard.analysis.results import Analysis
from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import plain_text

_PROMPTS = 10
_STYLES = {"bad": "bold red", "good": "green", "": "yellow"}


@dataclass(frozen=True)
class TextTable:
    """Headings and rows of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def print_analysis(analysis: Analysis, file: Any = None) -> None:
    """Print the verdict and the tables with rich.

    Args:
        analysis: of one checkpoint.
        file: a text stream; standard output by default.

    Raises:
        GuardError: rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise GuardError("Expected rich, to print tables. pip install 'passk-guard[report]'") from error
    console, data = Console(file=file, highlight=False), analysis.to_dict()
    sentence, kind = words.verdict(data)
    console.print(Text(plain_text(sentence), style=_STYLES[kind]))
    console.print(Text(plain_text(_about(data)), style="dim"))
    for content in tables(data):
        # Text and not str: rich reads "[...]" in a str as markup.
        table = Table(title=Text(content.title), title_justify="left")
        for column, cells in zip(content.columns, zip(*content.rows, strict=True), strict=True):
            table.add_column(Text(column), overflow="fold", min_width=_longest_word(cells))
        for row in content.rows:
            table.add_row(*(Text(plain_text(cell)) for cell in row))
        console.print(table)


def _longest_word(cells: Iterable[str]) -> int:
    """Room for a status on one line; longer words may be folded."""
    return min(12, max(len(word) for cell in cells for word in plain_text(cell).split(" ")))


def tables(data: words.Data) -> Iterator[TextTable]:
    """The tables of an analysis that have rows."""
    for table in (_at_k(data), _prompts(data), _mitigations(data)):
        if table.rows:
            yield table


def _about(data: words.Data) -> str:
    remark = f" {data['remark']}." if data["remark"] else ""
    return (
        f"{data['model']['name']}: {data['num_prompts']} prompts x {data['settings']['num_samples']} samples; "
        f"{data['never_solved']} never solved, {data['always_solved']} always, {data['left_out']} left out.{remark}"
    )


def _at_k(data: words.Data) -> TextTable:
    rows = [
        (
            str(at["k"]),
            words.with_interval(at["pass_rate"]),
            "1" if at["k"] == 1 else words.with_interval(at["mean_weight"], 2),
            "" if at["status"] is None else words.with_interval(at["cosine"], 2),
            at["status"] or "",
        )
        for at in data["at_k"]
    ]
    title = f"pass@k and its angle to pass@1, {words.level(data)} intervals. {words.k_star(data)}"
    return TextTable(title, ("k", "pass@k", "E[w_k]", "cos(∇J_k, ∇J_1)", "status"), rows)


def _prompts(data: words.Data) -> TextTable:
    texts = {p["place"]: p["text"] for p in data["prompts"]}
    rows = [
        (
            words.excerpt(p["text"], 60),
            words.with_interval(p["share"], 2),
            words.with_interval(p["pass_rate"], 2),
            words.with_interval(p["weight"], 2),
            words.scientific(p["agreement"]),
            words.hurt(p, texts, 24, most=1),
        )
        for p in words.most_negative(data, _PROMPTS)
    ]
    columns = ("prompt", "share of the conflict", "p-hat", "w_k", "agreement", "hurts most")
    return TextTable("The most negatively interfering prompts", columns, rows)


def _mitigations(data: words.Data) -> TextTable:
    rows = [
        (p["name"], p["setting"], words.with_interval(p["cosine"], 2), words.with_interval(p["kept"], 2), p["note"])
        for p in data["predictions"]
    ]
    columns = ("mitigation", "setting", "cosine to expect", "pass@k gain kept", "note")
    return TextTable("What the mitigations would do", columns, rows)
