"""Cells, headings and what a sort will read."""

import re

import pytest

from passk_guard.reporting.html.page import TEMPLATES

PARTS = TEMPLATES.get_template("parts.html.j2").make_module({"headings": []})


def table(columns, numbers=(), rows=""):
    return PARTS.table("what it holds", columns, numbers, caller=lambda: rows)


def cells(markup):
    return re.findall(r"<td([^>]*)>(.*?)</td>", markup, re.S)


def test_numbers_are_aligned_and_sort_by_their_value():
    found = cells("".join(PARTS.number_cell(v, 3) for v in (0.5, -1e-3, 12345, None, float("nan"))))
    assert [text for _, text in found] == ["0.500", "−0.001", "12345", "–", "–"]
    keys = [re.search(r'data-sort="([^"]*)"', attributes) for attributes, _ in found]
    assert [float(k[1]) for k in keys if k] == [0.5, -0.001, 12345.0]
    assert keys[3] is keys[4] is None, "what is missing sorts last"
    assert all('class="number"' in attributes for attributes, _ in found)


def test_headings_are_buttons():
    markup = table(["first", "second"], ["second"])
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
    ((_, shown),) = cells(PARTS.text_cell(text))
    if summary is None:
        assert shown == text
    else:
        assert shown == f'<details><summary>{summary} …</summary><div class="whole">{text}</div></details>'


def test_rows_are_markup_and_texts_in_them_are_not():
    assert "<tbody>\n&lt;b&gt;\n</tbody>" in table(["a"], rows="<b>")
    assert cells(table(["a"], rows=PARTS.text_cell("<b>"))) == [(' class="text" data-sort="&lt;b&gt;"', "&lt;b&gt;")]
    assert cells(PARTS.text_cell(None)) == [(' class="text"', "–")]
