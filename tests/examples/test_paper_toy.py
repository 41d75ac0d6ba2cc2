"""examples/paper_toy.py reproduces the paper's printed numbers, and reports a mismatch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from examples import paper_toy

ROOT = Path(__file__).parents[2]


def test_script_reproduces_every_printed_number():
    run = subprocess.run(
        [sys.executable, "examples/paper_toy.py"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    lines = {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines() if line.strip()}
    printed = json.loads(paper_toy.REFERENCE.read_text())["printed_in_paper"]
    for name in printed:
        paper, ours, _ = lines[name]
        assert paper == ours, name


def test_a_wrong_theta_is_a_mismatch():
    reference = json.loads(paper_toy.REFERENCE.read_text())
    assert paper_toy.mismatches(paper_toy.reproduce(reference), reference) == []
    wrong = paper_toy.mismatches(paper_toy.reproduce(reference | {"theta": [-2.0, -1.8]}), reference)
    assert any(line.startswith("J10_after: ours 0.9") for line in wrong)


def test_conflict_and_its_repair():
    """The qualitative claims: the step buys pass@10 with pass@1; projected, neither falls."""
    ours = paper_toy.reproduce(json.loads(paper_toy.REFERENCE.read_text()))
    assert ours["cosine"] < 0
    assert ours["J1_after"] < ours["J1_before"]
    assert ours["J10_after"] > ours["J10_before"]
    assert ours["pcgrad_one_sided_delta_J1"] > 0
    assert ours["pcgrad_one_sided_delta_J10"] > 0
