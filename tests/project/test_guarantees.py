"""Every promise in docs/guarantees.md and every fault in docs/faults.md names a test that exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def rows(page):
    """Lines of the tables of a page, without their heads."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    heads = [i - 1 for i, line in enumerate(lines) if line.startswith("|---")]
    return [line for i, line in enumerate(lines) if line.startswith("| ") and i not in heads]


def named(line):
    return re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?(?:\[[^`]*\])?`", line)


@cache
def functions(path):
    return {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", ["guarantees.md", "faults.md"])
def test_every_line_names_a_test_that_exists(page):
    assert len(rows(page)) > 20
    for line in rows(page):
        assert named(line), line
        for path, name in named(line):
            assert any(found.startswith("test_") for found in functions(path)), path
            assert not name or name in functions(path), f"{path}::{name}"


def test_what_takes_several_processes_is_marked():
    for line in rows("guarantees.md"):
        distributed = [path for path, _ in named(line) if "/distributed/" in path]
        assert not distributed or "(d)" in line, line


def test_every_case_of_a_distributed_fault_exists():
    from tests.distributed.test_faults import CASES

    found = re.findall(r"test_faults\.py::test_a_fault\[(\w+)-(\w+)\]", "".join(rows("faults.md")))
    assert set(found) <= set(CASES)
    assert {name for _, name in found} == {name for _, name in CASES}
