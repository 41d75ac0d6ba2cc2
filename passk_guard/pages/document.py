"""One self-contained page: sections under a title, nothing from the network, nothing that text can run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from passk_guard.pages.html import Html, join, tag
from passk_guard.pages.script import SCRIPT
from passk_guard.pages.style import STYLE
from passk_guard.utils.errors import GuardError


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
                "Expected `body_html` made by the components of passk_guard.pages; found "
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
