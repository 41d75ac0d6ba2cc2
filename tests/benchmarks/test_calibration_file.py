"""A measurement in the file of results is kept and not repeated."""

from pathlib import Path

import pytest

from benchmarks.calibration import PARTS, plan
from benchmarks.calibration_file import Measurement, read, take_missing

KEPT = Path(__file__).parents[2] / "benchmarks" / "calibration.jsonl"


def measurement(m, calls, records=2):
    def take():
        calls.append(m)
        return [{"m": m, "statistic": i} for i in range(records)]

    return Measurement({"part": "cells", "seed": 0, "m": m}, take)


def test_missing_measurements_are_added_and_others_kept(tmp_path):
    path, calls = tmp_path / "new" / "found.jsonl", []
    assert take_missing([measurement(m, calls) for m in (1, 2)], path) == 2
    before = path.read_text()
    assert take_missing([measurement(m, calls) for m in (1, 2, 3)], path) == 1
    assert calls == [1, 2, 3]
    assert path.read_text().startswith(before)
    assert [(r["m"], r["statistic"], r["seed"]) for r in read(path)] == [(m, i, 0) for m in (1, 2, 3) for i in (0, 1)]


def test_a_measurement_that_is_cut_off_leaves_what_was_there(tmp_path):
    path, calls = tmp_path / "found.jsonl", []

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_missing([measurement(1, calls), Measurement({"m": 2}, stopped)], path)
    assert [r["m"] for r in read(path)] == [1, 1]


def test_another_seed_is_another_measurement():
    asked = Measurement({"m": 1, "seed": 1}, list)
    assert not asked.answered([{"m": 1}, {"m": 1, "seed": 2}])
    assert asked.answered([{"m": 1, "seed": 1}])
    assert Measurement({"m": 1, "seed": 0}, list).answered([{"m": 1}]), "records from before there was a choice"


def test_the_kept_results_answer_the_whole_plan():
    records = read(KEPT)
    for part in PARTS:
        asked = list(plan(part, False, Path("nowhere"), 0))
        assert asked
        assert all(each.answered(records) for each in asked)
        assert not any(each.answered(records) for each in plan(part, True, Path("nowhere"), 0))
