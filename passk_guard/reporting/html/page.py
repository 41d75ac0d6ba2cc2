"""Writing a page to a file, whole, and over none that is not ours."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from passk_guard.reporting.html.elements import Html, join, tag
from passk_guard.utils.errors import GuardError
from passk_guard.utils.files import write_whole

# The one style sheet of our pages: light and dark, from 360 pixels up, no fonts or images from elsewhere.
#
# Charts are drawn in user units and scaled to the column; on a narrow screen their text is set larger in those units
# and every second tick label is left out, so that it stays readable.


# Okabe and Ito's colours, which people with any colour vision tell apart; the dark theme takes their lighter ones.
STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1b1f24; --faint: #57606a; --line: #d0d7de; --box: #f6f8fa; --link: #0550ae;
  --c0: #0072b2; --c1: #d55e00; --c2: #007a59; --c3: #a8558a; --c4: #b37a00; --c5: #4a5560;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --ink: #e6e9ed; --faint: #a1abb5; --line: #3a424b; --box: #1d2228; --link: #79b8ff;
    --c0: #56b4e9; --c1: #f08a3c; --c2: #2fc79c; --c3: #dd92bb; --c4: #f0c24f; --c5: #b4bec8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1200px; margin: 0 auto; padding: 16px 20px 48px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 8px 0 4px; }
h3 { font-size: 1rem; margin: 20px 0 4px; }
h2 { font-size: 1.2rem; margin: 36px 0 8px; padding-top: 12px; border-top: 1px solid var(--line); }
p { margin: 8px 0; max-width: 75ch; }
a { color: var(--link); }
nav { margin: 12px 0; }
nav ul { display: flex; flex-wrap: wrap; gap: 2px 18px; list-style: none; margin: 0; padding: 0; }
:focus-visible { outline: 3px solid var(--c0); outline-offset: 2px; }
.note { color: var(--faint); font-size: .9rem; }
.callout { border-left: 4px solid var(--c4); background: var(--box); padding: 8px 12px; max-width: 80ch; }
.callout.bad { border-left-color: var(--c1); }
.callout.good { border-left-color: var(--c2); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 8px; margin: 12px 0; }
.facts div { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: 8px 12px; }
.facts dt { color: var(--faint); font-size: .85rem; }
.facts dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px 24px; }
figure { margin: 0; min-width: 0; max-width: 820px; }
figcaption { font-size: .9rem; margin-top: 4px; }
figure > .name { font-weight: 600; margin: 0 0 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; list-style: none; margin: 2px 0 0; padding: 0; }
.legend li { display: flex; align-items: center; gap: 6px; font-size: .9rem; }
.legend svg { flex: none; width: 36px; height: 14px; }
svg.chart { display: block; width: 100%; height: auto; }
svg.chart text { font-size: 13px; fill: var(--ink); }
svg .tick, svg .axis-name { fill: var(--faint); }
svg .grid { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
svg .frame { stroke: var(--faint); stroke-width: 1; fill: none; vector-effect: non-scaling-stroke; }
svg .curve { fill: none; stroke: currentColor; stroke-width: 2; vector-effect: non-scaling-stroke; }
svg .band { fill: currentColor; fill-opacity: .18; stroke: none; }
svg .band.thin { stroke: currentColor; stroke-opacity: .45; stroke-width: 3; vector-effect: non-scaling-stroke; }
svg .dot { fill: var(--page); stroke: currentColor; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
svg .dot.solid { fill: currentColor; }
svg .dot.faint { fill-opacity: .55; stroke-opacity: .8; }
svg .bar { fill: currentColor; fill-opacity: .3; stroke: none; }
svg .upright, svg .level { stroke: currentColor; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
svg .block { fill: none; stroke: currentColor; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
svg .block.filled { fill: currentColor; fill-opacity: .75; }
svg .edge { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 4 3; vector-effect: non-scaling-stroke; }
svg .crisp { image-rendering: pixelated; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.d1 { stroke-dasharray: 7 4; } .d2 { stroke-dasharray: 2 3; } .d3 { stroke-dasharray: 9 3 2 3; }
.table-box { overflow: auto; max-height: 560px; border: 1px solid var(--line); border-radius: 6px; margin: 8px 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 8px 10px; color: var(--faint); }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { position: sticky; top: 0; background: var(--box); white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.text { min-width: 14ch; max-width: 60ch; white-space: pre-wrap; overflow-wrap: break-word; }
td.long { min-width: 34ch; }
th button {
  all: unset; cursor: pointer; font-weight: 600; padding: 2px 0; white-space: nowrap;
}
th button:focus-visible { outline: 3px solid var(--c0); outline-offset: 2px; }
th button::after { content: " \\2195"; color: var(--faint); }
th[aria-sort="ascending"] button::after { content: " \\2191"; color: var(--ink); }
th[aria-sort="descending"] button::after { content: " \\2193"; color: var(--ink); }
summary { cursor: pointer; }
details .whole { white-space: pre-wrap; margin-top: 6px; max-height: 320px; overflow: auto; }
@media (max-width: 640px) {
  main { padding: 8px 14px 32px; }
  svg.chart text { font-size: 21px; }
  svg.chart .second { display: none; }
}
@media print { .table-box { max-height: none; } nav { display: none; } }
"""


# The one script of our pages: sorting tables by the buttons in their headings.


SCRIPT = """
"use strict";
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const row = heading.parentElement;
    const body = heading.closest("table").tBodies[0];
    const column = Array.prototype.indexOf.call(row.children, heading);
    const numeric = heading.classList.contains("number");
    const rising = heading.getAttribute("aria-sort") === (numeric ? "descending" : "none") ||
      !heading.hasAttribute("aria-sort") && !numeric;
    for (const other of row.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const key = (line) => line.children[column].dataset.sort;
    const compare = (a, b) => {
      const x = key(a), y = key(b);
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
      return rising ? order : -order;
    };
    body.append(...Array.from(body.rows).sort(compare));
  });
}
"""


# One self-contained page: sections under a title, nothing from the network, nothing that text can run.


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        heading: text.
        body_html: markup made by the components of this package.
        note: text beneath the heading, what a reader needs to know to read the section.
    """

    heading: str
    body_html: Html
    note: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.body_html, Html):
            raise GuardError(
                "Expected `body_html` made by the components of passk_guard.reporting.html; found "
                f"{type(self.body_html).__name__} in section {self.heading!r}. Pass text through `paragraph`."
            )


def render_page(title: str, sections: Sequence[Section], *, kind: str = "page", lead: Html | None = None) -> str:
    """The whole page as text, to be written as UTF-8.

    The content security policy allows our own style sheet and script by their hashes and images held in the page,
    and nothing else: text that got past the escaping could not run.

    Args:
        title: text, the heading of the page.
        sections: in reading order; with three or more a list of links stands on top.
        kind: what wrote the page, found again by `page_kind`.
        lead: markup between the title and the first section.

    Returns:
        HTML with LF line ends, ending in one.
    """
    numbered = [_section(number, section) for number, section in enumerate(sections)]
    body = tag("main", tag("h1", title), lead or Html(), _links(sections), *numbered)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy()),
        _kind_mark(kind),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', body, tag('script', Html(SCRIPT))), lang='en')}\n"


def page_kind(text: str, kind: str) -> bool:
    """Whether this text was written by `render_page` with this kind: such a file may be written over."""
    return text.startswith("<!DOCTYPE html>\n") and _kind_mark(kind) in text[:2000]


def in_a_frame(page: str, height: int = 720) -> Html:
    """A whole page as one element, for notebooks: its styles and its policy stay inside."""
    return tag(
        "iframe", srcdoc=page, width="100%", height=height, frameborder=0, sandbox="allow-scripts", title="passk_guard"
    )


def _kind_mark(kind: str) -> Html:
    return tag("meta", name="passk-guard-page", content=kind)


def _policy() -> str:
    return (
        f"default-src 'none'; style-src '{_digest(STYLE)}'; script-src '{_digest(SCRIPT)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _section(number: int, section: Section) -> Html:
    note = tag("p", section.note, class_="note") if section.note else Html()
    return tag("section", tag("h2", section.heading), note, section.body_html, id=f"section-{number}")


def _links(sections: Sequence[Section]) -> Html:
    if len(sections) < 3:
        return Html()
    items = [tag("li", tag("a", s.heading, href=f"#section-{i}")) for i, s in enumerate(sections)]
    return tag("nav", tag("ul", join(items)), aria_label="Sections")


def save_page(page: str, path: str | Path, *, kind: str, force: bool = False) -> Path:
    """Write the page as UTF-8, by way of a file beside it, so that a reader never meets half of it.

    Args:
        page: from `render_page`, with this `kind`.
        path: of the file; its folder must exist.
        force: write over whatever is there. Without it only a page of the same kind is replaced.

    Raises:
        GuardError: `path` is a folder, holds something else, or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise GuardError(f"Expected a file to write the page to; found the folder {path}. Name a file in it.")
    try:
        if path.exists() and not force and not page_kind(_beginning(path), kind):
            raise GuardError(
                f"{path} exists and is not a page of this command: choose another file, or --force (force=True)."
            )
        write_whole(path, page)
    except OSError as error:
        raise GuardError(f"Cannot write {path}: {error.strerror or error}.") from error
    return path


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(4000).decode("utf-8", errors="replace")
