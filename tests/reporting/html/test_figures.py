"""Figures hold the numbers they were given, plotly accepts each of them, and no number is made up."""

import base64
import json
import math
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passk_guard.reporting.html.figures import (
    BLUE,
    VERMILLION,
    Figure,
    Panel,
    angle_over_k,
    averaged_down,
    band,
    colour_limit,
    curve,
    dots,
    heat_map,
    stacked,
    stretches,
)

NAN = float("nan")
TOLD = {"title": "t", "alt": "a", "note": ""}


def test_panels_share_one_axis_and_stand_above_each_other():
    xs, level = [0, 5, 10], [(0.05, "level")]
    panels = [
        Panel("first", [curve("a", xs, [1.0, NAN, 3.0], BLUE), band(xs, [0, 1, 2], [1, 2, 3], BLUE)]),
        Panel("second", [dots("b", xs, [1, 2, 3], [0.123456, None, 0.1], BLUE)], level, {"type": "log"}),
        Panel("third", [], empty="no <refresh> yet"),
    ]
    found = stacked(panels, title="t", alt="a", x_title="step")
    drawn = go.Figure(found.data, found.layout)  # plotly refuses a name or a value that it does not know
    assert {trace.xaxis for trace in drawn.data} == {"x"}, "only traces of one axis share the list of values"
    assert [trace.yaxis for trace in drawn.data] == ["y", "y", "y2"]
    assert drawn.data[0].y == (1.0, None, 3.0)
    assert drawn.data[2].error_y.array == (0.12, None, 0.1)
    domains = [found.layout[name]["domain"] for name in ("yaxis", "yaxis2", "yaxis3")]
    assert domains[0][1] == 1
    assert all(a[0] > b[1] for a, b in pairwise(domains))
    texts = {note["text"]: note["y"] for note in found.layout["annotations"]}
    assert texts["level"] == pytest.approx(math.log10(0.05))
    assert "no &lt;refresh&gt; yet" in texts
    assert (found.layout["hovermode"], found.layout["hoversubplots"]) == ("x unified", "axis")


def test_a_band_is_broken_where_an_end_is_unknown():
    found = band([0, 1, 2, 3], [0.0, 0.1, None, 0.3], [1.0, 1.1, 1.2, 1.3], BLUE)
    assert found["x"] == [0, 1, 1, 0, 0, None, 3, 3, 3, None]
    assert found["y"] == [1.0, 1.1, 0.1, 0.0, 1.0, None, 1.3, 0.3, 1.3, None]


@given(st.lists(st.booleans(), max_size=12))
def test_stretches_are_the_maximal_ones(defined):
    found = stretches(defined)
    assert [i for run in found for i in run] == [i for i, here in enumerate(defined) if here]
    assert all(b.start > a.stop for a, b in pairwise(found))


def test_the_angle_over_k():
    xs, bands = [1, 2, 3], [([0.9, -1.0, -1.0], [1.0, 1.0, 1.0], "band")]
    told = TOLD | {"threshold": 0.0, "k_star": 1, "established": [False, True, False]}
    found = angle_over_k(xs, [1.0, -0.5, None], bands, **told)
    drawn = go.Figure(found.data, found.layout)
    assert drawn.data[-1].marker.color == (BLUE, VERMILLION, BLUE)
    assert max(x for x in drawn.data[0].x if x) == 2, "an interval of all that is possible is no band"
    assert "Not determined at k = 3." in found.note
    assert {shape.x0 for shape in drawn.layout.shapes if shape.xref == "x"} == {1}


def test_cells_name_their_two_prompts_and_many_are_averaged():
    matrix = torch.tensor([[NAN, -1.0], [1.0, 5.0]])
    found = heat_map(matrix, ["<b>x</b>", "second"], side="prompt", **TOLD)
    (cells,) = go.Figure(found.data, found.layout).data
    assert cells.y == ("1: &lt;b&gt;x&lt;/b&gt;", "2: second")
    values = np.frombuffer(base64.b64decode(found.data[0]["z"]["bdata"]), "f4").reshape(2, 2)
    assert np.array_equal(values, matrix.numpy(), equal_nan=True)
    assert (cells.zmin, cells.zmax) == (-1.0, 1.0)
    large = heat_map(torch.randn(1000, 1000), [str(i) for i in range(1000)], side="prompt", **TOLD)
    assert large.data[0]["z"]["shape"] == "250, 250"
    assert large.data[0]["y"][1] == "5 and on: 4"
    assert "Each cell is the mean of 4 x 4 entries" in large.note
    assert len(large.json) < 500_000


def test_the_json_of_a_figure_cannot_end_its_block():
    found = Figure("t", "a", [curve("</script><b>", [1], [2.0], BLUE)], {})
    assert "<" not in found.json
    assert json.loads(found.json)["data"][0]["name"] == "&lt;/script&gt;&lt;b&gt;"


def test_averages_are_those_of_the_blocks():
    matrix = torch.randn(10, 7, dtype=torch.float64)
    matrix[0, 0] = NAN
    matrix[9, 6] = NAN
    small, block = averaged_down(matrix, 4)
    assert block == 3
    for i in range(4):
        for j in range(3):
            entries = [v for row in matrix[3 * i : 3 * i + 3, 3 * j : 3 * j + 3].tolist() for v in row if v == v]
            expected = sum(entries) / len(entries) if entries else NAN
            assert small[i, j].item() == pytest.approx(expected, nan_ok=True)
    assert averaged_down(matrix, 10)[1] == 1


def test_the_limit_leaves_out_the_diagonal_and_what_is_silent():
    matrix = torch.full((4, 4), 0.0)
    matrix[0, 1] = -2.0
    matrix[1, 2] = NAN
    matrix.fill_diagonal_(100.0)
    assert colour_limit(matrix) == 2.0
    assert colour_limit(torch.zeros(3, 3)) == 1.0
    values = torch.arange(1, 101, dtype=torch.float64)[None, :]
    assert colour_limit(values) == 98.0
