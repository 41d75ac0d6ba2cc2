"""examples/notebooks/first_run.ipynb: its cells run, and its script is that of examples/quickstart.py.

python -m tests.examples.test_notebook    # runs it and writes what its cells print into it
"""

import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "examples" / "notebooks" / "first_run.ipynb"


def code_cells(book):
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def run(book, folder):
    """What each cell of code prints, in this folder."""
    names, printed, before = {"__name__": "__main__"}, [], Path.cwd()
    os.chdir(folder)
    try:
        for number, cell in enumerate(code_cells(book)):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
            printed.append(out.getvalue())
    finally:
        os.chdir(before)
    return printed


def kept(cell):
    return "".join(line for output in cell["outputs"] for line in output["text"])


def without_numbers(text):
    return re.sub(r"[-+]?\d+(\.\d+)?", "#", text)


def test_the_script_is_that_of_the_quickstart():
    script = "\n\n".join("".join(cell["source"]) for cell in code_cells(json.loads(BOOK.read_text()))[:3])
    whole = (ROOT / "examples" / "quickstart.py").read_text().partition('"""\n\n')[2]
    assert re.sub(r"\n+", "\n", script) == re.sub(r"\n+", "\n", whole).rstrip()


@pytest.mark.slow
def test_the_notebook_runs_and_prints_what_it_shows(tmp_path):
    book = json.loads(BOOK.read_text())
    for cell, printed in zip(code_cells(book)[3:], run(book, tmp_path)[3:], strict=True):
        assert printed
        assert without_numbers(kept(cell)).splitlines()[:1] == without_numbers(printed).splitlines()[:1]
    assert "pass@1" in (tmp_path / "report.html").read_text()


if __name__ == "__main__":
    book = json.loads(BOOK.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        for number, (cell, text) in enumerate(zip(code_cells(book), run(book, scratch), strict=True)):
            shown = [line for line in text.splitlines(keepends=True) if number > 2]
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": shown}] if shown else []
            cell["execution_count"] = number + 1
    BOOK.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n")
