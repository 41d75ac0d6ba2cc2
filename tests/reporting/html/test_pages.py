"""Text is never markup, whatever it holds."""

import base64
import gzip
import hashlib
import json
import re
import sys

import jinja2
import pytest

from passk_guard.reporting.html.figures import BLUE, Figure, curve
from passk_guard.reporting.html.page import (
    SCRIPT,
    STYLE,
    TEMPLATES,
    data_link,
    in_a_frame,
    packed_plotly,
    page_kind,
    render_page,
)
from passk_guard.utils.errors import GuardError
from tests.helpers.hostile import HOSTILE, PAYLOADS, Page

EVERYTHING = TEMPLATES.from_string(
    """{% extends "page.html.j2" %}{% import "parts.html.j2" as parts with context %}
{% block sections %}{% for chart in charts %}{% call parts.section(text, text) %}
{{ parts.callout(text) }}<dl>{{ parts.fact(text, text) }}</dl>{{ parts.figures(chart) }}{{ text }}
{{ parts.run_toggles(runs) }}{{ parts.downloads([(text, link)]) }}
{% call parts.table(text, [text]) %}<tr>{{ parts.text_cell(text) }}{{ parts.number_cell(1.0) }}</tr>{% endcall %}
{% endcall %}{% endfor %}{% endblock %}"""
)


def charts(text, count=3):
    """Figures with the text wherever they take text."""
    return [Figure(text, text, [curve(text, [0, 1], [0.5, None], BLUE)], {}, note=text) for _ in range(count)]


def page(text):
    return made(text, charts=charts(text))


def made(text, **more):
    common = {
        "text": text,
        "runs": [{"name": text}] * 2,
        "link": data_link(text.encode("utf-8", "replace").decode(), "text/csv"),
    }
    return render_page(EVERYTHING, text, kind="test", **common, **more)


@pytest.mark.parametrize("text", [*PAYLOADS, HOSTILE])
def test_hostile_text_adds_no_element_and_no_attribute(text):
    line_ends = text.count("\n")
    plain = Page(page("harmless" + "x" * len(text) + "\ny" * line_ends))
    hostile = Page(page(text))
    assert hostile.elements == plain.elements
    assert hostile.attributes == plain.attributes
    assert hostile.script.strip() == SCRIPT.strip()
    assert [json.loads(block)["data"][0]["x"] for block in hostile.blocks if block.strip().startswith("{")] == [
        [0, 1]
    ] * 3
    assert "49" not in hostile.text or "7*7" not in text, "a text was run as a template"


def test_a_name_that_the_template_misses_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="'charts' is undefined"):
        made("x")


def test_the_policy_names_the_scripts_of_the_page():
    text = page("x")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert f"<style>{STYLE}</style>" in text
    assert f"<script>{SCRIPT}</script>" in text
    packed = re.search(r'<script type="text/plain" id="plotly">([^<]*)</script>', text)[1]
    plotly = gzip.decompress(base64.b64decode(packed)).decode()
    assert "plotly.js v" in plotly[:200]
    for script in (SCRIPT, plotly):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy.replace("style-src 'unsafe-inline'", "")
    assert not re.search(r'(?:src|href)="(?!#|data:)', text), "something from elsewhere"


def test_without_plotly_the_error_says_what_to_install(monkeypatch):
    packed_plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(GuardError, match=re.escape('pip install "passk-guard[report]"')):
        page("x")


def test_without_javascript_the_figure_says_what_it_shows():
    text = Page(page("Pass@1 fell")).text
    assert text.count("Pass@1 fell (Drawn where JavaScript runs.)") == 3


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
    assert frame.values["sandbox"] == "allow-scripts allow-downloads"


def test_links_to_the_sections_stand_on_top():
    assert Page(page("x")).links[:3] == [f"#section-{i}" for i in range(3)]
    assert "<nav" not in made("x", charts=charts("x", 2))
