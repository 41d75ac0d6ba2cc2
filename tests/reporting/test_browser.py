"""Our pages in a real browser: no script error, every figure there, no overflow, keyboard, hostile text.

`PASSK_GUARD_SHOTS=folder` keeps pictures of the pages.
"""

import os
from itertools import combinations
from pathlib import Path

import pytest
import torch
from passk_guard.reporting.html.charts import Band, Distribution, Points, Series, histogram, line_chart, scatter
from passk_guard.reporting.html.frame import Upright
from passk_guard.reporting.html.heat_map import heat_map

from passk_guard.reporting.html.page import TEMPLATES, render_page
from passk_guard.reporting.run_report import report
from tests.helpers.browser import Browser, find_chromium
from tests.helpers.hostile import HOSTILE
from tests.helpers.journals import write_run

pytestmark = pytest.mark.browser
TITLE = "passk_guard: a <b>page</b>"
TEMPLATE = TEMPLATES.from_string(
    """{% extends "page.html.j2" %}{% import "parts.html.j2" as parts with context %}
{% block sections %}{% call parts.section("Figures") %}{{ parts.figures(*pictures) }}{% endcall %}
{% call parts.section("Table") %}{% call parts.table("Prompts", ["prompt", "score", "n"], ["score", "n"]) %}
{% for text, score, n in rows %}
<tr>{{ parts.text_cell(text) }}{{ parts.number_cell(score) }}{{ parts.number_cell(n) }}</tr>
{% endfor %}
{% endcall %}{% endcall %}{% call parts.section(text) %}{% endcall %}{% endblock %}"""
)
WIDTHS, SCHEMES = (1280, 400), ("light", "dark")


@pytest.fixture(scope="module")
def browser():
    if find_chromium() is None:
        pytest.fail("no Chromium on this machine: install it, on Debian with `apt-get install chromium`")
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A page with every component and hostile text in each; the path and the number of figures."""
    path = tmp_path_factory.mktemp("parts") / "parts.html"
    path.write_text(render_page(TEMPLATE, TITLE, kind="test", **_parts()), encoding="utf-8")
    return path, 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The report of two runs with hostile texts in the journal."""
    folder = tmp_path_factory.mktemp("runs")
    a = write_run(folder / "observed", hostile=True, settings={"k": 8})
    b = write_run(folder / "guarded", guarded=True, settings={"k": 8, "mitigation": "project"})
    return report(a, b).save(folder / "both.html"), 11


def _parts():
    xs = list(range(20))
    kernel = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    axes = {"x_label": HOSTILE[:30], "alt": HOSTILE, "title": HOSTILE[:40]}
    band = Band(xs, [i - 3.0 for i in xs], [None if i == 4 else i + 3.0 for i in xs], HOSTILE[:20])
    pictures = [
        line_chart([Series(HOSTILE[:30], xs, xs)], [band], [Upright(5, HOSTILE)], y_label="y", **axes),
        scatter([Points("p", xs, xs, [HOSTILE] * 20)], y_label="y", **axes),
        histogram([Distribution("before", xs), Distribution("after", xs[5:])], **axes),
        heat_map(kernel, alt=HOSTILE, title="300 prompts"),
        heat_map(kernel[:20, :20], alt="k", title="20 prompts"),
        heat_map(kernel.repeat(4, 4)[:1000, :1000], alt="k", title="1000 prompts"),
    ]
    rows = [(HOSTILE, 0.5, 10), ("beta", None, 9), ("alpha", -2.5, 100), ("<b>gamma</b>", 3.25, 1)]
    return {"pictures": pictures, "rows": rows, "text": HOSTILE[:50]}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["parts", "runs"])
def test_pages_at_all_widths_and_in_both_themes(name, width, scheme, browser, request):
    path, pictures = request.getfixturevalue(name)
    browser.open(path, width=width, scheme=scheme)
    assert browser.complaints() == []
    assert browser.requests() == [path.as_uri()], "something was fetched"
    assert browser.evaluate("document.title").startswith("passk_guard: ")
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    # Of every picture: it has an area, a name, and stays within the page.
    seen = browser.evaluate(
        "[...document.querySelectorAll('svg[role=img]')].map(s => { const r = s.getBoundingClientRect(); "
        "return r.width > 250 && r.height > 40 && r.right <= innerWidth && !!s.getAttribute('aria-label') })"
    )
    assert seen == [True] * pictures
    assert all(browser.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)") or [True])
    _keep(browser, f"{name}-{width}-{scheme}")


@pytest.mark.parametrize("width", WIDTHS)
def test_text_is_large_enough_and_does_not_overlap(width, runs, browser):
    browser.open(runs[0], width=width)
    sizes = browser.evaluate(
        "[...document.querySelectorAll('svg.chart text')].filter(t => getComputedStyle(t).display !== 'none')"
        ".map(t => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a)"
    )
    assert min(sizes) >= 10.5
    boxes = browser.evaluate(
        "[...document.querySelectorAll('svg.chart')].map(s => [...s.querySelectorAll('text')]"
        ".map(t => t.getBoundingClientRect()).filter(r => r.width).map(r => [r.left, r.right, r.top, r.bottom]))"
    )
    assert sum(len(chart) for chart in boxes) > 50
    overlapping = [pair for chart in boxes for pair in combinations(chart, 2) if _overlap(*pair)]
    assert overlapping == []


def _overlap(one, other):
    """Of boxes (left, right, top, bottom); line boxes are taller than what is written in them."""
    across = one[0] < other[1] - 1 and other[0] < one[1] - 1
    return across and one[2] < other[3] - 4 and other[2] < one[3] - 4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_and_curves_stand_out_from_the_page(scheme, runs, browser):
    """WCAG 2.2 contrast: 4.5 for text, 3 for what is drawn."""
    browser.open(runs[0], scheme=scheme)
    page = _luminance(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    for selector, least in (("h1", 4.5), (".note", 4.5), ("svg .tick", 4.5), ("a", 4.5), *_curves()):
        property = "fill" if "tick" in selector else "color"
        colour = browser.evaluate(f"getComputedStyle(document.querySelector({selector!r})).{property}")
        bright, dim = sorted([_luminance(colour), page], reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= least, (selector, colour)
    assert (page < 0.2) == (scheme == "dark")


def _curves():
    return [(f".c{i}", 3.0) for i in (0, 1, 2, 3, 5)]  # those that the report uses


def _luminance(colour):
    parts = [int(p) / 255 for p in colour[colour.index("(") + 1 : colour.index(")")].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_a_table_sorts_by_mouse_and_by_keyboard(parts, browser):
    browser.open(parts[0])
    assert _column(browser, 2) == ["10", "9", "100", "1"]
    browser.evaluate("document.querySelectorAll('th button')[2].click()")
    assert _column(browser, 2) == ["100", "10", "9", "1"], "by value, largest first"
    assert _sorted(browser) == [None, None, "descending"]
    # From the last link above the table by Tab to the box, the headings, and Enter or Space on them.
    browser.evaluate("document.querySelector('.table-box').focus()")
    browser.press("Tab", "Tab")
    browser.press("Tab", "Tab")
    assert browser.evaluate("document.activeElement.textContent") == "score"
    outline = browser.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "where the focus is must be seen"
    browser.press("Enter", "Enter", "\r")
    assert _column(browser, 1) == ["3.25", "0.5", "−2.5", "–"]
    browser.press(" ", "Space", " ")
    assert _column(browser, 1) == ["−2.5", "0.5", "3.25", "–"], "what is missing stays last"
    assert _sorted(browser) == [None, "ascending", None]
    browser.evaluate("document.querySelectorAll('th button')[0].click()")
    assert _column(browser, 0)[-2:] == ["alpha", "beta"]
    assert _sorted(browser) == ["ascending", None, None]
    assert browser.complaints() == []


def test_hostile_text_does_nothing(parts, runs, browser):
    for path, _ in (parts, runs):
        browser.open(path)
        browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.evaluate("document.title").startswith("passk_guard: ")
        assert browser.evaluate("document.scripts.length") == 1
        assert browser.evaluate("document.images.length + document.querySelectorAll('b, i').length") == 0
        held = browser.evaluate("document.body.innerText")
        assert "<script>document.title='broken'</script>" in held
        assert "\x1b" not in held
        assert browser.complaints() == []


def test_the_policy_stops_what_would_get_past_the_escaping(parts, browser, tmp_path):
    """The harness sees complaints, and the page is safe a second time."""
    broken = tmp_path / "broken.html"
    page = parts[0].read_text(encoding="utf-8")
    broken.write_text(page.replace("</main>", "<script>document.title = 'broken'</script></main>"), encoding="utf-8")
    browser.open(broken)
    assert browser.evaluate("document.title") == TITLE
    assert any("Content Security Policy" in text for text in browser.complaints())


def test_a_notebook_frame_runs_the_page(tmp_path, browser):
    found = report(write_run(tmp_path / "run"))
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{found._repr_html_()}", encoding="utf-8")
    browser.open(notebook)
    assert browser.complaints() == []
    assert browser.evaluate("document.querySelector('iframe').getBoundingClientRect().height") > 300


def _column(browser, number):
    return browser.evaluate(f"[...document.querySelectorAll('tbody tr')].map(r => r.children[{number}].textContent)")


def _sorted(browser):
    return browser.evaluate("[...document.querySelectorAll('th')].map(t => t.getAttribute('aria-sort'))")


def _keep(browser, name):
    if folder := os.environ.get("PASSK_GUARD_SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.screenshot(Path(folder) / f"{name}.png")
