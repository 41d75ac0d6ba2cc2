"""Cells, headings and what a sort will read."""

import re

import pytest

from passk_guard.reporting.html import Column, cut_text, paragraph, table


def cells(markup):
    return re.findall(r"<td([^>]*)>(.*?)</td>", markup, re.S)


def test_numbers_are_aligned_and_sort_by_their_value():
    found = cells(
        table([Column("p", "number", 3)], [(0.5,), (-1e-3,), (12345,), (None,), (float("nan"),)], caption="c")
    )
    assert [text for _, text in found] == ["0.500", "−0.001", "12345", "–", "–"]
    keys = [re.search(r'data-sort="([^"]*)"', attributes) for attributes, _ in found]
    assert [float(k[1]) for k in keys if k] == [0.5, -0.001, 12345.0]
    assert keys[3] is keys[4] is None, "what is missing sorts last"
    assert all('class="number"' in attributes for attributes, _ in found)


def test_headings_are_buttons():
    markup = table([Column("first"), Column("second", "number")], [], caption="what it holds")
    headings = re.findall(r'<th scope="col" class="(\w+)"><button type="button">(\w+)</button></th>', markup)
    assert headings == [("text", "first"), ("number", "second")]
    assert 'tabindex="0" role="region" aria-label="what it holds"' in markup


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("short", None),
        ("x" * 80, None),
        ("x" * 81, "x" * 80),
        ("first\nsecond", "first"),
        ("a" * 70 + " " * 20, "a" * 70),
    ],
)
def test_long_texts_open_on_demand(text, summary):
    shown = cut_text(text)
    if summary is None:
        assert shown == f"<span>{text}</span>"
    else:
        assert shown == f'<details><summary>{summary} …</summary><div class="whole">{text}</div></details>'


def test_components_may_stand_in_a_cell():
    assert "<p>x</p>" in table([Column("a")], [(paragraph("x"),)], caption="c")


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        table([Column("a"), Column("b")], [("x",)], caption="c")
