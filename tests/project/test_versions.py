"""The versions that pyproject.toml allows are the ones that the constraints files install."""

import re
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    requirement
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for requirement in group
    if not requirement.startswith("passk-guard")
]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name):
    """Library: release, as a tuple without trailing zeros, of each line of a constraints file."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "every line pins one version"
    return {normal(library): release(found) for library, found in (line.split("==") for line in lines)}


def release(text):
    numbers = [int(part) for part in text.split(".")] if re.fullmatch(r"[\d.]+", text) else [text]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def lower_bounds():
    for requirement in REQUIREMENTS:
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement)
        assert match, f"Expected `library>=version`; found {requirement!r}, whose oldest version nobody could test"
        yield normal(match[1]), release(match[2])


def test_the_oldest_versions_are_the_lower_bounds():
    oldest, newest, bounds = pins("constraints-oldest.txt"), pins("constraints.txt"), dict(lower_bounds())
    assert bounds.pop("torch") <= oldest["torch"] == newest["torch"], "no older torch was at hand: see the file's head"
    assert {library: oldest.get(library) for library in bounds} == bounds


def test_a_library_has_one_lower_bound():
    assert len(dict(lower_bounds())) == len(set(lower_bounds()))


def test_the_newest_versions_are_within_the_ranges():
    newest = pins("constraints.txt")
    assert all(newest[library] >= bound for library, bound in lower_bounds())
