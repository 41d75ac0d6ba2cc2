"""The page is complete, stands alone, and stays small and readable with many prompts."""

import html
import io
import json
import re

import plotly.graph_objects as go
import pytest

from passk_guard.analysis import words
from passk_guard.analysis.page import analysis_page
from passk_guard.analysis.words import print_analysis
from tests.analysis.cases import synthetic
from tests.helpers.hostile import Page

SECTIONS = [
    "How often the model is right",
    "Does pass@k cost pass@1?",
    "Prompt kernel",
    "Weights and agreement",
    "Prompts that pull against the others",
    "What the mitigations would do",
    "Settings and sketch",
]


@pytest.fixture(scope="module")
def page():
    return analysis_page(synthetic(160).to_dict())


def test_every_section_is_there(page):
    assert [html.unescape(title) for title in re.findall(r"<h2>(.*?)</h2>", page)] == SECTIONS


def test_every_figure_is_one_of_plotly_with_a_text_alternative(page):
    held = Page(page)
    figures = [json.loads(block) for block in held.blocks if block.startswith("{")]
    assert len(figures) == len(re.findall(r'role="img" aria-label="[^"]{20,}"', page)) == 4
    for figure in figures:
        go.Figure(figure)
    (kernel,) = (trace for figure in figures for trace in figure["data"] if trace["type"] == "heatmap")
    assert re.fullmatch(r"1: …\d+ odd numbers, and why\?|1: …\d+…", kernel["y"][0])


def test_a_clear_one_reads_as_one():
    data = synthetic(300, cosine=0.6).to_dict()
    assert data["at_k"][-1]["status"] == "clear"
    page, file = Page(analysis_page(data)).text, io.StringIO()
    print_analysis(synthetic(300, cosine=0.6), file)
    for shown in (page, file.getvalue()):
        assert "Clear: " in shown
        assert "share of" not in shown
        assert "What the mitigations would do" not in shown
    assert "Prompts that agree least with the others" in page


def test_an_interval_of_all_that_is_possible_is_undetermined():
    number = {"value": 0.3, "standard_error": None, "low": -1.0, "high": 1.0}
    assert words.told(number) == "undetermined"
    assert words.told(number | {"high": 0.5}).replace("\u00a0", " ") == "0.30 [−1.00, 0.50]"


@pytest.mark.parametrize("made", [{"m": 160}, {"m": 160, "text": "word " * 40 + "{}"}, {"m": 3}])
def test_tables_do_not_wrap_at_80_columns(made, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    analysis, file = synthetic(**made), io.StringIO()
    print_analysis(analysis, file)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    for table in words.tables(analysis.to_dict()):
        for row in table.rows:
            assert any(" ".join(row).split() == line.split() for line in lines), row


def test_the_numbers_that_matter_are_on_it(page):
    analysis = synthetic(160)
    for at in analysis.at_k:
        assert f"{at.pass_rate.value:.3f}" in page
    assert f"{analysis.at_k[-1].cosine.value:.2f}".replace("-", "−") in page
    assert "90% of 1,000 parameters; not: gain" in page
    assert f"k* = {analysis.curve.k_star}" in page


def test_no_number_is_made_up_where_nothing_is_known():
    page = analysis_page(synthetic(3).to_dict())
    assert "undetermined" in page.lower()
    assert ">nan<" not in page.lower()
    assert ">None<" not in page


def test_a_thousand_prompts_are_a_small_page():
    analysis = synthetic(1000)
    page = analysis_page(analysis.to_dict())
    assert len(page.encode()) < 3_700_000
    assert page.count("<tr>") < 150
    assert "Each cell is the mean" in page
