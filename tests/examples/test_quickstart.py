"""The script that a new user would write: its output is kept in docs/quickstart.md, word for word.

python -m tests.examples.test_quickstart    # writes script and output into the page anew
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT, PAGE = ROOT / "examples" / "quickstart.py", ROOT / "docs" / "quickstart.md"
FOREIGN = re.compile(r"^\[20|FutureWarning|^  warnings\.warn")  # of libraries that a new user need not have


def output(folder):
    """What the script prints, from an empty folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT.name]
    (Path(folder) / SCRIPT.name).write_text(SCRIPT.read_text())
    run = subprocess.run(command, cwd=folder, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT)
    lines = [line for line in run.stdout.splitlines() if not FOREIGN.search(line)]
    assert run.returncode == 0, lines
    return lines


def kept(language):
    return re.search(rf"^```{language}\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)[1].splitlines()


def without_numbers(lines):
    return [re.sub(r"[-+]?\d+(\.\d+)?", "#", line) for line in lines]


def test_the_page_has_the_script_of_some_twenty_lines():
    assert kept("python") == SCRIPT.read_text().splitlines()
    assert sum(bool(line.strip()) for line in kept("python")) <= 25


@pytest.mark.slow
def test_the_page_has_what_it_prints(tmp_path):
    found = output(tmp_path)
    assert without_numbers(found) == without_numbers(kept("text"))
    assert (tmp_path / "out" / "passk_guard.jsonl").is_file()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        printed = "\n".join(output(scratch))
    page = PAGE.read_text()
    for language, text in (("python", SCRIPT.read_text().rstrip("\n")), ("text", printed)):
        block = f"```{language}\n{text}\n```"
        page = re.sub(rf"^```{language}\n(.*?)^```", lambda _, block=block: block, page, flags=re.M | re.S)
    PAGE.write_text(page)
