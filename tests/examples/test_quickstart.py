"""The script that a new user would write: README and docs/quickstart.md have it and what it prints, word for word.

python -m tests.examples.test_quickstart    # writes script and output into both anew
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT, PAGE, README = ROOT / "examples" / "quickstart.py", ROOT / "docs" / "quickstart.md", ROOT / "README.md"
SHOWN = re.compile(r"step \d+: (CLEAR|GAINING)|passk_guard ends")  # in the README
FOREIGN = re.compile(r"^\[20|FutureWarning|^  warnings\.warn")  # of libraries that a new user need not have


def printed(folder, *command, package=ROOT):
    """What a Python program prints in this folder, with the package from another."""
    environment = os.environ | {"PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command]
    run = subprocess.run(command, cwd=folder, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT)
    lines = [line for line in run.stdout.splitlines() if not FOREIGN.search(line)]
    assert run.returncode == 0, lines
    return lines


def output(folder, package=ROOT):
    """What the script prints, from an empty folder; TRL's rows of numbers are left out."""
    (Path(folder) / SCRIPT.name).write_text(SCRIPT.read_text())
    lines = printed(folder, SCRIPT.name, package=package)
    rows = [line for line in lines if line.startswith("{")]
    assert "'passk_guard/pass_at_4_total': " in "".join(rows)
    return [line for line in lines if line not in rows]


def kept(language, page=PAGE):
    return re.search(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)[1].splitlines()


def without_numbers(lines):
    return [re.sub(r"[-+]?\d+(\.\d+)?", "#", line) for line in lines]


def test_both_pages_have_the_script_of_some_twenty_lines():
    assert kept("python") == kept("python", README) == SCRIPT.read_text().splitlines()
    assert sum(bool(line.strip()) for line in kept("python")) <= 25
    assert kept("text", README) == [line for line in kept("text") if SHOWN.search(line)]


def files(package):
    return {path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}


@pytest.mark.slow
def test_the_page_has_what_the_wheel_prints(tmp_path):
    """The package is installed from a wheel, which takes a package index: of hatchling, which builds it."""
    wheel, folder = tmp_path / "wheel", tmp_path / "run"
    folder.mkdir()
    printed(tmp_path, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(wheel), str(ROOT))
    demo = {path for path in files(wheel / "passk_guard") if path.parts[0] == "_demo"}
    assert files(wheel / "passk_guard") - demo == files(ROOT / "passk_guard")
    found = printed(folder, "-c", "from passk_guard.cli import _demo; print(_demo().__module__)", package=wheel)
    assert found[-1:] == ["passk_guard._demo.demo"], "`passk-guard demo` needs no checkout"
    found = printed(folder, "-c", "import passk_guard; print(passk_guard.__file__)", package=wheel)
    assert found == [str(wheel / "passk_guard" / "__init__.py")]
    assert without_numbers(output(folder, wheel)) == without_numbers(kept("text"))
    printed(folder, str(wheel / "bin" / "passk-guard"), "report", "out", package=wheel)
    assert "pass@1" in (folder / "out" / "passk_guard.html").read_text()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        text = "\n".join(output(scratch))
    shown = "\n".join(filter(SHOWN.search, text.splitlines()))
    for page, lines in ((PAGE, text), (README, shown)):
        content = page.read_text()
        for language, code in (("python", SCRIPT.read_text().rstrip("\n")), ("text", lines)):
            block = f"```{language}\n{code}\n```"
            content = re.sub(rf"^```{language}\n(.*?)^```", lambda _, b=block: b, content, flags=re.M | re.S)
        page.write_text(content)
