"""Prompts are untrusted: neither the terminal nor the page may be steered by them."""

import io
import re

import pytest

from passk_guard.analysis import words
from passk_guard.analysis.page import analysis_page
from passk_guard.analysis.words import print_analysis, tables
from passk_guard.utils.text import plain_text
from tests.analysis.cases import synthetic

EVIL = "\x1b[31m[bold]<script>alert(1)</script>\x1b]0;title\x07 \u202ednetxet\u2069 \x9b2J\x07\r\n[/nothing] & \ud800"


@pytest.fixture(scope="module")
def hostile():
    return synthetic(20, text="[italic]{}" + EVIL, name=f"model {EVIL}")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("3 + 4 = 7", "3 + 4 = 7"),
        ("a\n\tb\r\n c", "a b c"),
        ("\x1b[1;31mred\x1b[0m \x1b[2K\x1b[1A", "red"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x07", "link"),
        ("\x1b]0;never ended", ""),
        ("\x9b31mred\x9d0;t\x9c!", "red!"),
        ("\x1bc\x1b(Breset", "reset"),
        ("a\x00b\x08c\x7f", "abc"),
        ("\u202eright\u202c\u200b", "right"),
        ("a\ud800b", "ab"),
        ("naïve 日本 ½", "naïve 日本 ½"),
    ],
)
def test_plain_text(text, plain):
    assert plain_text(text) == plain


def test_the_terminal_shows_markup_as_text(hostile):
    file = io.StringIO()
    print_analysis(hostile, file)
    shown = file.getvalue()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2069]", shown)
    assert "[bold]" in "".join(shown.split())
    assert "[italic]" in "".join(shown.split())  # in a table, of a prompt
    assert "<script>" in "".join(shown.split())


def test_the_page_escapes_prompts_everywhere(hostile):
    page = analysis_page(hostile.to_dict())
    assert page.count("<script>") == 1  # our own
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2069\ud800-\udfff]", page)


def test_saving_hostile_prompts(hostile, tmp_path):
    hostile.save(tmp_path)
    assert "<script>alert" not in (tmp_path / "analysis.html").read_text()
    assert hostile._repr_html_().startswith("<iframe")
    assert "<script>" not in hostile._repr_html_()


def number(value=None, error=None, low=None, high=None):
    return {"value": value, "standard_error": error, "low": low, "high": high}


def test_numbers_come_with_their_uncertainty():
    assert words.with_interval(number()) == "undetermined"
    assert words.scientific(number()) == "undetermined"
    assert words.with_interval(number(-0.5, 0.1, -0.7, -0.25), 2).replace("\u00a0", " ") == "−0.50 [−0.70, −0.25]"
    assert words.with_interval(number(0.5, 0.125)).replace("\u00a0", " ") == "0.500 ± 0.125"
    assert words.with_interval(number(1.0), 1).replace("\u00a0", " ") == "1.0 no spread seen"
    assert words.scientific(number(-1234.5, 100.2)).replace("\u00a0", " ") == "−1234 ± 100"
    assert words.scientific(number(-1.24e-5, 3e-6)).replace("\u00a0", " ") == "−1.2e−05 ± 3e−06"


def test_verdicts_say_what_is_known():
    def data(status, value=-0.4, established=(False, True), ends=(1, 1), lows=(1.0, -0.7)):
        at = {"k": 8, "status": status, "reason": "why", "cosine": number(value, 0.1, -0.6, -0.2)}
        curve = {"k": [1, 2], "established": established, "k_star": 1, "low": lows}
        curve |= {"k_star_low": ends[0], "k_star_high": ends[1]}
        return {"at_k": [at], "curve": curve, "settings": {"confidence": 0.9, "threshold": 0.0}}

    sentence, kind = words.verdict(data("conflict"))
    assert (sentence[:8], kind) == ("Conflict", "bad")
    assert "90% interval" in sentence
    assert "k* = 1" in sentence
    assert words.verdict(data("clear"))[1] == "good"
    assert words.verdict(data("undetermined", None)) == ("Undetermined at k = 8: why.", "")
    smaller = words.verdict(data("undetermined", None, established=(False, False), ends=(2, 2)))[0]
    assert smaller.startswith("Undetermined at k = 8: why. There is no conflict up to k = 2")
    assert "cannot tell" in words.verdict(data("undetermined"))[0]
    assert words.k_star(data("conflict")) == "k* = 1: up to there no conflict is established; 90% set: 1 to 1."
    none = {"established": (False, False)}
    clear = words.k_star(data("clear", ends=(2, 2), **none))
    assert clear.startswith("There is no conflict up to k = 2")
    assert clear.endswith("90% set: 2 to 2 or more.")
    for ends in ((1, 2), (None, None)):  # this version, and an earlier one without a band
        assert words.k_star(data("undetermined", ends=ends, **none)).startswith("The probe cannot tell at which k")
    assert words.k_star(data("clear", ends=(None, None), lows=(1.0, 0.1), **none)).startswith("There is no conflict")


@pytest.mark.parametrize(("m", "says"), [(12, "choose prompts"), (300, "with 90% power on ")])
def test_an_undetermined_analysis_says_how_many_prompts_it_would_take(m, says):
    data = synthetic(m, cosine=0.0).to_dict()
    assert data["at_k"][-1]["status"] == "undetermined"
    sentence, kind = words.verdict(data)
    assert kind == ""
    assert "cannot tell" in sentence or "Undetermined" in sentence
    assert says in sentence
    assert "no conflict is established" not in sentence


def test_the_worst_prompts_come_first_and_those_that_agree_not_at_all(hostile):
    data = hostile.to_dict()
    shares = [p["share"]["value"] for p in words.most_negative(data, 5)]
    assert shares == sorted(shares, reverse=True)
    assert all(shares)
    assert {t.title for t in tables(data)} >= {"What the mitigations would do"}
