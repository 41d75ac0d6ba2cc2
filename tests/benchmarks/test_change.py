"""The figures of the realised change's benchmark, from records whose figures are known by hand."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from benchmarks.calibration_file import read
from benchmarks.change import passed, plan, sampled_rates, total_figures, window_figures


def window(change, exact, step=0, **others):
    place = {"optimizer": "sgd", "seed": 0, "step": step}
    found = {"change": change, "exact": exact, "se": 0.01, "degrees": 1e6, "fresh": exact + 0.03, "again": exact - 0.04}
    return place | found | {name + "_k": value for name, value in found.items()} | others


def test_figures_of_windows():
    rows = [window(-0.02, -0.03), window(-0.05, -0.02, 5), window(0.02, 0.02, 10, change_k=0.12)]
    found = window_figures(rows)
    rms = math.sqrt((0.01**2 + 0.03**2) / 3)
    assert found == pytest.approx(
        {
            "windows": 3,
            "bias": -0.02 / 3,
            "bias_se": rms / math.sqrt(3),
            "covered": 2 / 3,  # errors of 1, 3 and 0 standard errors
            "rms": rms,
            "fresh": 0.03,
            "again": 0.04,
        }
    )
    assert window_figures(rows, "_k")["bias"] == pytest.approx(0.08 / 3)
    together = [row | {"step": 0} for row in rows]
    assert window_figures(together)["bias_se"] == pytest.approx(0.02 / 3), "one sample, whose errors add up"


def test_few_degrees_of_freedom_widen_the_interval():
    assert window_figures([window(0.03, 0.0)])["covered"] == 0
    assert window_figures([window(0.03, 0.0, degrees=3)])["covered"] == 1  # t = 3.18 at 97.5%


def total(seed, exact, total):
    given = {"optimizer": "sgd", "seed": seed, "exact": exact, "total": total, "fused": exact, "fresh": exact + 0.1}
    given |= {"low": total - 0.01, "high": total + 0.01, "seq_low": total - 0.03, "seq_high": total + 0.03}
    return given


def test_figures_of_totals():
    rows = [
        total(0, 0.0, 0.02),  # outside its interval, within its sequence
        total(0, -0.1, -0.1),
        total(1, -0.1, -0.1),
        total(1, -0.2, -0.16),  # outside both: the run is, though its other check is within
    ]
    expected = {"runs": 2, "within": 1, "covered": 0.5, "rms": math.sqrt(0.002 / 4), "fused": 0.0, "fresh": 0.1}
    assert total_figures(rows) == pytest.approx(expected)
    other = [row | {"optimizer": "adamw"} for row in rows]
    assert total_figures(rows + other)["runs"] == 4


def test_rates_of_solved_hopeless_and_even_prompts():
    rates = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    assert passed(rates, 1) == pytest.approx(0.5)
    assert passed(rates, 2) == pytest.approx(1.75 / 3)
    assert sampled_rates(torch.tensor([0.0, 1.0], dtype=torch.float64)) == (0.5, 0.5)
    torch.manual_seed(0)
    one, many = sampled_rates(torch.full((4096,), 0.1, dtype=torch.float64))
    assert one == pytest.approx(0.1, abs=0.005)
    assert many == pytest.approx(1 - 0.9**8, abs=0.02)


def test_warm_starts_take_turns_and_a_run_is_asked_for_once(tmp_path):
    asked = [each.asked for each in plan(["sgd", "adamw"], [3, 4], [0], tmp_path)]
    assert asked == [{"optimizer": o, "seed": seed} for seed in (3, 4) for o in ("sgd", "adamw")]


def test_the_kept_windows_show_what_is_promised():
    records = read(Path(__file__).parents[2] / "benchmarks" / "change.jsonl")
    windows = [r for r in records if r["what"] == "window"]
    for suffix in ("", "_k"):
        found = window_figures(windows, suffix)
        assert abs(found["bias"]) <= 2 * found["bias_se"]
        assert 0.92 <= found["covered"] <= 0.97
    for kind in itertools.product(("sgd", "adamw"), (1, 2, 5)):
        found = window_figures([r for r in windows if (r["optimizer"], r["length"]) == kind])
        assert found["rms"] <= found["fresh"] / 5
    totals = total_figures([r for r in records if r["what"] == "total"])
    assert totals["within"] == totals["runs"] == 8
