"""Text is never markup, whatever it holds."""

import base64
import hashlib
import re

import jinja2
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from passk_guard.reporting.html.charts import Distribution, Points, Series, histogram, line_chart, scatter
from passk_guard.reporting.html.frame import Level, Upright, escape, join, tag
from passk_guard.reporting.html.heat_map import heat_map
from passk_guard.reporting.html.page import SCRIPT, STYLE, TEMPLATES, in_a_frame, page_kind, render_page
from tests.helpers.hostile import HOSTILE, PAYLOADS, Page

EVERYTHING = TEMPLATES.from_string(
    """{% extends "page.html.j2" %}{% import "parts.html.j2" as parts with context %}
{% block sections %}{% for chart in charts %}{% call parts.section(text, text) %}
{{ parts.callout(text) }}<dl>{{ parts.fact(text, text) }}</dl>{{ parts.figures(chart) }}{{ text }}
{% call parts.table(text, [text]) %}<tr>{{ parts.text_cell(text) }}{{ parts.number_cell(1.0) }}</tr>{% endcall %}
{% endcall %}{% endfor %}{% endblock %}"""
)


def charts(text):
    """Every chart with the text wherever it takes text."""
    xs, ys = [0.0, 1.0, 2.0], [0.5, None, 1.0]
    mark, level = Upright(1.0, text, title=text), Level(0.2, text)
    axes = {"x_label": text, "alt": text, "title": text}
    return [
        line_chart([Series(text, xs, ys)], markers=[mark], levels=[level], y_label=text, **axes),
        scatter([Points(text, xs, ys, [text] * 3)], levels=[level], y_label=text, **axes),
        histogram([Distribution(text, ys)], [mark], y_label=text, **axes),
        heat_map(torch.tensor([[1.0, -1.0]] * 2), alt=text, title=text, label=text),
    ]


def page(text):
    return render_page(EVERYTHING, text, kind="test", text=text, charts=charts(text))


@pytest.mark.parametrize("text", [*PAYLOADS, HOSTILE])
def test_hostile_text_adds_no_element_and_no_attribute(text):
    line_ends = text.count("\n")
    plain = Page(page("harmless" + "x" * len(text) + "\ny" * line_ends))
    hostile = Page(page(text))
    assert hostile.elements == plain.elements
    assert hostile.attributes == plain.attributes
    assert hostile.script.strip() == SCRIPT.strip()
    assert "49" not in hostile.text or "7*7" not in text, "a text was run as a template"


@given(st.text(st.characters(), max_size=30))
def test_any_text_stays_text(text):
    held = Page(tag("p", text))
    assert held.elements == ["p"]
    assert held.attributes == set()
    kept = [ch for ch in text if ch.isprintable() and ch not in "⟨⟩"]
    remaining = iter(held.text)
    assert all(ch in remaining for ch in kept), "a printable character was lost"
    inside = re.fullmatch(r'<i title="([^"<>]*)"></i>', tag("i", title=text))
    assert inside, "an attribute that closes early"
    tag("p", text).encode("utf-8")


def test_what_hides_is_shown():
    assert escape("a\x1b[31mb\x00c\x7f") == "a␛[31mb␀c␡"
    assert escape("\u202eabc\u2066") == "⟨U+202E⟩abc⟨U+2066⟩"
    assert escape("\ud800") == "\ufffd"
    assert escape("a\r\nb\tc") == "a\nb\tc"


def test_markup_that_went_through_a_string_is_escaped_again():
    made = tag("b", "x")
    assert tag("p", made) == "<p><b>x</b></p>"
    assert tag("p", f"{made}") == "<p>&lt;b&gt;x&lt;/b&gt;</p>"
    assert tag("p", title=made) == '<p title="&lt;b&gt;x&lt;/b&gt;"></p>', "an attribute is text"
    assert type(join([made, "<"])) is Markup


def test_a_name_that_the_template_misses_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="'charts' is undefined"):
        render_page(EVERYTHING, "x", kind="test", text="x")


def test_the_policy_names_what_the_page_holds():
    text = page("x")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    for name, file in (("script", SCRIPT), ("style", STYLE)):
        assert re.search(rf"<{name}>(.*?)</{name}>", text, re.S)[1] == file
        digest = base64.b64encode(hashlib.sha256(file.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert " style=" not in text, "inline styles are not allowed by the policy"
    assert not re.search(r'(?:src|href)="(?!#|data:)', text), "something from elsewhere"


def test_the_kind_of_a_page_cannot_be_forged_by_text():
    mark = '<meta name="passk-guard-page" content="other">'
    assert page_kind(page("x"), "test")
    assert not page_kind(page(mark), "other")
    assert not page_kind(mark, "other")


def test_a_frame_holds_the_whole_page():
    text = page(HOSTILE)
    frame = Page(in_a_frame(text))
    assert frame.elements == ["iframe"]
    assert frame.values["srcdoc"] == text
    assert frame.values["sandbox"] == "allow-scripts"


def test_links_to_the_sections_stand_on_top():
    assert Page(page("x")).links == [f"#section-{i}" for i in range(4)] + Page(page("x")).links[4:]
    few = render_page(EVERYTHING, "x", kind="test", text="x", charts=charts("x")[:2])
    assert "<nav" not in few
