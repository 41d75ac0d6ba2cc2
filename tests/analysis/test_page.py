"""The page is complete, stands alone, and stays small and readable with many prompts."""

import html
import re

import pytest

from passk_guard.analysis.page import analysis_page
from tests.analysis.cases import synthetic

SECTIONS = [
    "How often the model is right",
    "Does pass@k cost pass@1?",
    "Prompt kernel",
    "Weights and agreement",
    "The most negatively interfering prompts",
    "What the mitigations would do",
    "Settings and sketch",
]


@pytest.fixture(scope="module")
def page():
    return analysis_page(synthetic(160).to_dict())


def test_every_section_is_there(page):
    assert [html.unescape(title) for title in re.findall(r"<h2>(.*?)</h2>", page)] == SECTIONS


def test_every_picture_has_a_text_alternative(page):
    pictures = re.findall(r"<svg class=\"chart\".*?</desc>|<svg.*?role=\"img\".*?</desc>", page)
    assert len(pictures) == 6
    assert all(re.search(r'aria-label="[^"]{20,}"', picture) for picture in pictures)


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
    assert len(page.encode()) < 2_000_000
    assert page.count("<tr>") < 150
    assert "Each cell is the mean" in page
