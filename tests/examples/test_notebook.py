"""examples/notebooks: their cells run, and the script of first_run.ipynb is that of examples/quickstart.py.

python -m tests.examples.test_notebook [NAME]    # runs them, or one, and writes what their cells print into them
"""

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOOKS = ROOT / "examples" / "notebooks"
SILENT = {"first_run": 3, "reading_a_report": 0}  # cells at the beginning whose output is not kept


def code_cells(book):
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def run(book, folder):
    """What each cell of code prints, in this folder."""
    names, printed, before = {"__name__": "__main__"}, [], Path.cwd()
    shutil.copytree(BOOKS / "demo_run", Path(folder) / "demo_run")
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


def read(name):
    return json.loads((BOOKS / f"{name}.ipynb").read_text())


def test_the_script_is_that_of_the_quickstart():
    script = "\n\n".join("".join(cell["source"]) for cell in code_cells(read("first_run"))[:3])
    whole = (ROOT / "examples" / "quickstart.py").read_text().partition('"""\n\n')[2]
    assert re.sub(r"\n+", "\n", script) == re.sub(r"\n+", "\n", whole).rstrip()


@pytest.mark.slow
def test_the_notebook_runs_and_prints_what_it_shows(tmp_path):
    book = read("first_run")
    for cell, printed in zip(code_cells(book)[3:], run(book, tmp_path)[3:], strict=True):
        assert printed
        assert without_numbers(kept(cell)).splitlines()[:1] == without_numbers(printed).splitlines()[:1]
    assert "pass@1" in (tmp_path / "report.html").read_text()


def test_reading_a_report_prints_what_it_shows(tmp_path):
    book = read("reading_a_report")
    for cell, printed in zip(code_cells(book), run(book, tmp_path), strict=True):
        assert printed == kept(cell)
    text = "".join(map(kept, code_cells(book)))
    for words in ("pass@1 fell by ", "LOSING from step 10", "CONFLICT", "easy: -", "hard: +"):
        assert words in text, "what the notebook tells of the run"
    assert "pass@1 fell by " in (tmp_path / "report.html").read_text()


if __name__ == "__main__":
    for name in sys.argv[1:] or SILENT:
        book = read(name)
        with tempfile.TemporaryDirectory() as scratch:
            for number, (cell, text) in enumerate(zip(code_cells(book), run(book, scratch), strict=True)):
                shown = [line for line in text.splitlines(keepends=True) if number >= SILENT[name]]
                cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": shown}] if shown else []
                cell["execution_count"] = number + 1
        (BOOKS / f"{name}.ipynb").write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n")
