"""`make audit` reports what was audited, and no answer does not count as no vulnerability."""

import runpy
from pathlib import Path

import pytest

AUDIT = runpy.run_path(str(Path(__file__).parents[2] / ".ci" / "audit.py"))
CLEAN = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        ([CLEAN], 0, "1 packages audited, 0 with"),
        ([CLEAN, BAD], 1, "b 2: X-1, mended in 3"),
        ([CLEAN, UNKNOWN], 0, "not known there: c"),
        ([UNKNOWN], 0, "nothing was audited"),
    ],
)
def test_the_verdict(found, status, words, capsys):
    assert AUDIT["verdict"](found) == status
    assert words in capsys.readouterr().out


def test_a_service_that_cannot_be_reached(tmp_path, capsys):
    tool = tmp_path / "pip-audit"
    tool.write_text("#!/bin/sh\necho 'ConnectionError: no network' >&2\nexit 1\n")
    tool.chmod(0o755)
    assert AUDIT["main"](str(tool), "constraints.txt") == 0
    assert "could not be reached, and nothing was audited: ConnectionError: no network" in capsys.readouterr().out
