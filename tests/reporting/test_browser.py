"""Our pages in a real browser: no script error, every figure drawn, no overflow, keyboard, hostile text.

`PASSK_GUARD_SHOTS=folder` keeps pictures of the pages.
"""

import os
import time
from pathlib import Path

import pytest
import torch

from passk_guard.analysis.comparison import Comparison
from passk_guard.analysis.page import analysis_page
from passk_guard.reporting.html.figures import BLUE, Figure, Panel, curve, dots, heat_map, stacked
from passk_guard.reporting.html.page import TEMPLATES, render_page
from passk_guard.reporting.run_report import report
from tests.analysis.cases import synthetic
from tests.helpers.browser import Browser, find_chromium
from tests.helpers.hostile import HOSTILE, PAYLOADS
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
def pages(tmp_path_factory):
    """Of every kind of page the path and its number of figures; hostile text wherever text goes."""
    folder = tmp_path_factory.mktemp("pages")
    a = write_run(folder / "observed", hostile=True, settings={"k": 8})
    b = write_run(folder / "guarded <i>&lt;b&gt;", guarded=True, settings={"k": 8, "mitigation": "project"})
    kernel = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    texts = [*PAYLOADS, HOSTILE]
    lines = [curve(text, [0, 1, 2], [i, None, i + 1], BLUE) for i, text in enumerate(texts)]
    told = {"alt": HOSTILE, "note": HOSTILE}
    pictures = [
        stacked([Panel(text, [line]) for text, line in zip(texts, lines, strict=True)], title="t", x_title="x", **told),
        heat_map(kernel, [texts[i % len(texts)] for i in range(300)], title=HOSTILE[:40], side="<b>s</b>", **told),
        Figure("hover", HOSTILE, [dots(HOSTILE, [0], [1], [0.1], BLUE)], {}),
    ]
    rows = [(HOSTILE, 0.5, 10), ("beta", None, 9), ("alpha", -2.5, 100), ("<b>gamma</b>", 3.25, 1)]
    made = {
        "parts": (render_page(TEMPLATE, TITLE, kind="test", pictures=pictures, rows=rows, text=HOSTILE[:50]), 3),
        "runs": (report(a, b).html, 2),
        "analysis": (analysis_page(synthetic(60, text=HOSTILE[:80] + "{}", name=HOSTILE[:40]).to_dict()), 4),
        "comparison": (_compared().html, 2),
    }
    for name, (page, _) in made.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return {name: (folder / f"{name}.html", count) for name, (_, count) in made.items()}


def _compared():
    ends = {"low": (-0.1, -0.1), "high": (-0.01, 0.2), "low_1": -0.1, "high_1": -0.02, "established_lower": True}
    counts = {"seed": 0, "num_samples": 16, "num_prompts": 8, "left_out": 0, "failures": 0, "verifier": HOSTILE}
    rates = {"pass_a": (0.5, 0.6), "pass_b": (0.4, 0.7), "difference": (-0.1, 0.1), "standard_error": (0.02, 0.0)}
    prompts = {"lost": ((HOSTILE, 0.9, 0.1), ("b", 0.5, 0.4)), "gained": (("<img src=x>", 0.1, 0.6),)}
    return Comparison(HOSTILE, "b", (1, 8), confidence=0.95, tolerance=0.0, **rates, **ends, **counts, **prompts)


def _open(browser, path, **how):
    """Open a page and wait until all its figures are drawn."""
    browser.open(path, **how)
    deadline = time.monotonic() + 60
    while browser.evaluate("document.querySelectorAll('.plot').length && !document.documentElement.dataset.drawn"):
        assert time.monotonic() < deadline, ("the figures were not drawn", browser.complaints())
        time.sleep(0.1)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["parts", "runs", "analysis", "comparison"])
def test_pages_at_both_widths_and_in_both_themes(name, width, browser, pages):
    path, count = pages[name]
    for scheme in SCHEMES if name == "runs" else SCHEMES[:: 1 if width == 1280 else -1][:1]:
        _open(browser, path, width=width, scheme=scheme)
        assert browser.complaints() == []
        assert browser.requests() == [path.as_uri()], "something was fetched"
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        # Of every figure: it has an area, a name, and stays within the page.
        seen = browser.evaluate(
            "[...document.querySelectorAll('.plot')].map(p => { const r = p.querySelector('.main-svg')"
            ".getBoundingClientRect(); return r.width > 250 && r.height > 40 && r.right <= innerWidth && "
            "p.getAttribute('role') === 'img' && p.getAttribute('aria-label').length > 9 })"
        )
        assert seen == [True] * count
        _keep(browser, f"{name}-{width}-{scheme}")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_and_curves_stand_out_from_the_page(scheme, pages, browser):
    """WCAG 2.2 contrast: 4.5 for text, 3 for what is drawn."""
    _open(browser, pages["runs"][0], scheme=scheme)
    page = _luminance(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    for selector, property, least in (
        ("h1", "color", 4.5),
        (".note", "color", 4.5),
        ("a", "color", 4.5),
        (".xtick text", "fill", 4.5),
        (".scatterlayer .js-line", "stroke", 3.0),
    ):
        colours = browser.evaluate(
            f"[...document.querySelectorAll({selector!r})].map(e => getComputedStyle(e).{property})"
        )
        for colour in set(colours):
            bright, dim = sorted([_luminance(colour), page], reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= least, (selector, colour)
    assert (page < 0.2) == (scheme == "dark")


def _luminance(colour):
    parts = [int(p) / 255 for p in colour[colour.index("(") + 1 : colour.index(")")].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_crosshair_reads_all_panels_and_a_run_is_toggled_by_keyboard(pages, browser):
    _open(browser, pages["runs"][0])
    browser.evaluate("document.querySelector('.plot').focus()")
    for _ in range(4):
        browser.press("ArrowRight", "ArrowRight")
    time.sleep(0.3)
    told = browser.evaluate("[...document.querySelectorAll('.hoverlayer text')].map(t => t.textContent)")
    assert told[0] == "15", "the fourth step"
    for text in ("angle, observed : CONFLICT", "pass@1, observed : 0.576 ± 0.03", "cosine, observed : −0.480"):
        assert any(line.startswith(text.split(" ±")[0]) for line in told), (text, told)
    assert any("guarded <i>&lt;b&gt;" in line for line in told), "a name is text"
    shown = "document.querySelector('.plot').data.filter(t => t.visible).map(t => t.meta.run)"
    assert set(browser.evaluate(shown)) == {0, 1}
    browser.evaluate("document.querySelector('input[data-run=\"1\"]').focus()")
    browser.press(" ", "Space", " ")
    time.sleep(0.5)
    assert set(browser.evaluate(shown)) == {0}
    assert browser.complaints() == []


def test_without_javascript_a_page_has_its_summary_and_tables(pages, browser):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        path = pages["runs"][0]
        browser.call("Page.navigate", url=path.as_uri())
        time.sleep(1)
        root = browser.call("DOM.getDocument", depth=0)["root"]["nodeId"]
        page = browser.call("DOM.getOuterHTML", nodeId=root)["outerHTML"]
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert "main-svg" not in page
    assert "CONFLICT from step 15 to 75" in page
    assert "(Drawn where JavaScript runs.)" in page
    assert page.count("<tr>") > 40


def test_a_table_sorts_by_mouse_and_by_keyboard(pages, browser):
    _open(browser, pages["parts"][0])
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


def test_hostile_text_does_nothing(pages, browser):
    for path, count in pages.values():
        _open(browser, path)
        browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        browser.evaluate("document.querySelectorAll('.plot').forEach(p => Plotly.Fx.hover(p, {xval: 0}, 'xy'))")
        time.sleep(0.3)
        assert browser.evaluate("document.title").startswith("passk_guard: ")
        executable = browser.evaluate("[...document.scripts].filter(s => !s.type).length")
        assert executable == 2, "ours and plotly's"
        assert browser.evaluate("document.images.length + document.querySelectorAll('main b, main iframe').length") == 0
        made = "svg a, svg img, svg script, svg foreignObject, [onerror], [onload], [onfocus], [onmouseover]"
        assert browser.evaluate(f"document.querySelectorAll('{made}').length") == 0
        drawn = browser.evaluate("[...document.querySelectorAll('svg text')].map(t => t.textContent).join(' ')")
        assert not {"\x1b", "\u202e"} & set(drawn)
        assert "\x1b" not in browser.evaluate("document.body.innerText")
        assert browser.complaints() == [], count
    _open(browser, pages["parts"][0])
    titles = browser.evaluate("[...document.querySelectorAll('.annotation-text')].map(t => t.textContent)")
    assert any("<script>document.title='broken'</script>" in title for title in titles), "shown, and never heeded"


def test_the_policy_stops_what_would_get_past_the_escaping(pages, browser, tmp_path):
    """The harness sees complaints, and the page is safe a second time."""
    broken = tmp_path / "broken.html"
    page = pages["parts"][0].read_text(encoding="utf-8")
    broken.write_text(page.replace("</main>", "<script>document.title = 'broken'</script></main>"), encoding="utf-8")
    _open(browser, broken)
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
