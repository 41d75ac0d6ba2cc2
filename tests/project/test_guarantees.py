"""Every promise in docs/guarantees.md names a test that exists, with the mark it claims."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROMISES = [line for line in (ROOT / "docs" / "guarantees.md").read_text().splitlines() if line.startswith("| ")]


def shown_by(line):
    return re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", line)


def test_every_promise_names_a_test_that_exists():
    promises = [line for line in PROMISES if not line.startswith(("| promise", "|---"))]
    assert len(promises) > 20
    for line in promises:
        assert shown_by(line), line
        for path, name in shown_by(line):
            tree = ast.parse((ROOT / path).read_text())
            names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert any(found.startswith("test_") for found in names), path
            assert not name or name in names, f"{path}::{name}"


def test_what_takes_several_processes_is_marked():
    for line in PROMISES:
        distributed = [path for path, _ in shown_by(line) if "/distributed/" in path]
        assert not distributed or "(d)" in line, line
