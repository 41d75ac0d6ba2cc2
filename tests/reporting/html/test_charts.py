"""Where points land, where curves break, what an axis says."""

import math
import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from passk_guard.reporting.html.axes import make_axis, padded, round_ticks, write_number
from passk_guard.reporting.html.charts import Band, Distribution, Points, Series, histogram, line_chart, runs, scatter
from passk_guard.reporting.html.frame import BOTTOM, LEFT, RIGHT, TOP, Upright

NAN = float("nan")
AXES = {"x_label": "x", "y_label": "y", "alt": "a picture"}


def curves(markup):
    """The (x, y) points of each curve in the picture, legend left out."""
    picture = markup.split("</svg>")[0]
    return [
        [tuple(map(float, p.split())) for p in path.split("L")]
        for path in re.findall(r'<path d="M([^"HVZ]*)" class="curve', picture)
    ]


def test_points_land_where_the_axes_say():
    chart = line_chart([Series("a", [0, 10], [0.0, 1.0])], y_range=(0.0, 2.0), **AXES)
    assert curves(chart) == [[(LEFT, BOTTOM), (RIGHT, (TOP + BOTTOM) / 2)]]


def test_a_curve_breaks_at_what_is_not_known():
    chart = line_chart([Series("a", range(7), [0, 1, None, 3, NAN, 5, 6])], **AXES)
    assert [len(curve) for curve in curves(chart)] == [2, 2]
    assert chart.split("</svg>")[0].count("<circle") == 5, "the point between two gaps is a dot"
    many = line_chart([Series("a", range(100), [1.0] * 50 + [None, 3.0, None] + [1.0] * 47)], **AXES)
    assert many.split("</svg>")[0].count("<circle") == 1, "only the one that no line reaches"


@given(st.lists(st.booleans(), max_size=12))
def test_runs_are_the_maximal_stretches(defined):
    found = runs(defined)
    assert [i for run in found for i in run] == [i for i, here in enumerate(defined) if here]
    assert all(b.start > a.stop for a, b in pairwise(found))


def test_a_single_interval_is_an_error_bar():
    band = Band([0, 1, 2], [0.0, None, NAN], [1.0, 1.0, 1.0])
    chart = line_chart([], [band], **AXES)
    assert chart.split("</svg>")[0].count("band thin") == 1


def test_series_differ_in_more_than_colour():
    chart = line_chart([Series(str(i), [0, 1], [i, i]) for i in range(4)], **AXES)
    styles = re.findall(r'class="curve (c\d) (d\d)"', chart.split("</svg>")[0])
    assert len({c for c, _ in styles}) == len({d for _, d in styles}) == 4
    legend = chart.split("figcaption")[1]
    assert all(f'class="curve {c} {d}"' in legend for c, d in styles)


def test_the_text_alternative():
    chart = line_chart([Series("a", [0, 1], [0, 1])], title="Name", **AXES)
    assert 'role="img" aria-label="Name: a picture"' in chart
    assert "<title>Name</title><desc>a picture</desc>" in chart
    assert 'class="legend"' in chart
    assert "aria-hidden" in chart.split("figcaption")[1]


def test_points_with_a_missing_coordinate_are_left_out():
    chart = scatter([Points("p", [0, 1, None], [0, NAN, 1], ["first", "second", "third"])], **AXES)
    picture = chart.split("</svg>")[0]
    assert picture.count("<circle") == 1
    assert "first" in picture
    assert "third" not in picture


@pytest.mark.parametrize("values", [[], [None], [NAN, NAN], [0.0], [1e-300], [-3.5], [1e12, 1e12]])
def test_there_is_always_a_picture(values):
    chart = line_chart([Series("a", range(len(values)), values)], **AXES)
    assert "<svg" in chart
    assert "nan" not in chart.split("<svg")[1].lower()
    assert "<svg" in histogram([Distribution("a", values)], x_label="x", alt="a")
    assert "<svg" in scatter([Points("a", values, values)], **AXES)


@example(1.0, 400400401.0, 3)  # 5e8, the round step above a half of the range, is longer than the range
@example(0.0, math.nextafter(1000.0, 0), 1)  # rounded, its logarithm is that of 1000
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(1, 9))
def test_ticks_are_round_and_within(low, width, count):
    high = low + width
    ticks = round_ticks(low, high, count)
    slack = 1e-6 * max(abs(low), abs(high), width)
    assert all(low - slack <= t <= high + slack for t in ticks)
    if width > 1e-5 * abs(low):
        assert 1 <= len(ticks) <= 3 * max(count, 3)
    whole = round_ticks(low, high, count, whole=True)
    assert all(abs(t - round(t)) <= slack for t in whole)


def test_a_logarithmic_axis_doubles():
    axis = make_axis([1, 16], 0, 100, log=True)
    assert [axis.at(k) for k in (1, 2, 4, 8, 16)] == [0, 25, 50, 75, 100]
    assert axis.labels == ["1", "2", "4", "8", "16"]


@pytest.mark.parametrize(
    ("value", "gap", "text"),
    [
        (-0.3, 0.1, "−0.3"),
        (0.25, 0.05, "0.25"),
        (-0.0001, 0.1, "0.0"),
        (12345.0, 1000, "12345"),
        (None, None, "–"),
        (NAN, 1, "–"),
        (0.123456, None, "0.1235"),
        (2e7, 1e6, "2e+07"),
    ],
)
def test_numbers_as_they_are_read(value, gap, text):
    assert write_number(value, gap) == text


def test_padding():
    assert padded([0.0, None, 1.0], 0.1) == pytest.approx((-0.1, 1.1))
    assert padded([None, NAN]) is None


def test_the_mean_of_a_distribution():
    chart = histogram(
        [Distribution("u", [1.0, None, 3.0, NAN]), Distribution("w", [1.0, 4.0]), Distribution("none", [None])],
        x_label="x",
        alt="Shapes.",
    )
    assert "mean, u: 2<" in chart
    assert "mean, w: 2.5<" in chart
    assert "<desc>Shapes. mean, u: 2. mean, w: 2.5</desc>" in chart


def test_bars_hold_their_share():
    chart = histogram([Distribution("u", [0.1, 0.2, 0.9, 7.0])], x_label="x", alt="a", bins=2, x_range=(0.0, 1.0))
    outline = re.search(r'd="M(\S+) (\S+?)(V[^"]*)"', chart)
    heights = [BOTTOM - float(h) for h in re.findall(r"V([\d.]+)", outline[3])[:2]]
    assert heights[0] == pytest.approx(heights[1], abs=0.2), "two of four each; 7 counts in the last bin"
    assert heights[0] == pytest.approx((BOTTOM - TOP) / 1.08, abs=0.2)


def test_vertical_lines_outside_the_frame_are_left_out():
    marks = [Upright(5.0, "inside"), Upright(50.0, "outside")]
    chart = line_chart([Series("a", [0, 10], [0, 1])], markers=marks, x_range=(0.0, 10.0), **AXES)
    assert chart.split("</svg>")[0].count('class="upright') == 1
