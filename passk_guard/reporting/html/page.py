"""Self-contained pages from templates: nothing from the network, nothing that text can run."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from passk_guard.reporting.html.text import is_number, visible, write_number
from passk_guard.utils.errors import GuardError
from passk_guard.utils.files import write_whole

_FOLDER = files("passk_guard.reporting.html") / "templates"
STYLE, SCRIPT = (_FOLDER.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "page.js"))
TEMPLATES = Environment(
    loader=PackageLoader("passk_guard.reporting.html"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=visible,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.globals["write_number"] = write_number
TEMPLATES.tests["a_number"] = is_number


@functools.cache
def packed_plotly() -> tuple[Markup, str]:
    """plotly.js of the installed package, gzipped, as base64; and the digest of the script for the policy.

    The package ships the full bundle alone, 4.8 MB. Packed it takes 1.9 MB of a page, which unpacks it itself.

    Raises:
        GuardError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise GuardError('Expected plotly, which draws the pages. pip install "passk-guard[report]"') from error
    script = get_plotlyjs()
    return Markup(base64.b64encode(gzip.compress(script.encode(), 9, mtime=0)).decode()), _digest(script)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def render_page(template: str | Template, title: str, *, kind: str, **data: Any) -> str:
    """The whole page as text, to be written as UTF-8.

    Args:
        template: one that extends `page.html.j2`, or its name; with three or more sections a list of links stands on
            top.
        title: text, the heading of the page.
        kind: what wrote the page, found again by `page_kind`.
        data: what the template names. Text is escaped; figures are `Figure`.

    Returns:
        HTML with LF line ends, ending in one.

    Raises:
        GuardError: plotly is not installed.
    """
    plotly, digest = packed_plotly()
    # Our own script and plotly's by their hashes, images held in the page, and nothing else: text that got past the
    # escaping could not run. Styles are free, since plotly writes them into the page; none can fetch anything.
    policy = Markup(
        f"default-src 'none'; style-src 'unsafe-inline'; script-src '{_digest(SCRIPT)}' '{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return TEMPLATES.get_template(template).render(
        data,
        title=title,
        kind_mark=_kind_mark(kind),
        policy=policy,
        style=Markup(STYLE),
        script=Markup(SCRIPT),
        plotly=plotly,
        headings=[],
    )


def data_link(content: Any, media: str = "application/json") -> Markup:
    """An address that holds a whole file, a text or what becomes JSON, for a link that downloads it."""
    content = content if isinstance(content, str) else json.dumps(content)
    return Markup(f"data:{media};charset=utf-8;base64,{base64.b64encode(content.encode()).decode()}")


def page_kind(text: str, kind: str) -> bool:
    """Whether this text was written by `render_page` with this kind: such a file may be written over."""
    return text.startswith("<!DOCTYPE html>\n") and _kind_mark(kind) in text[:2000]


def _kind_mark(kind: str) -> Markup:
    return Markup('<meta name="passk-guard-page" content="{}">').format(kind)


def in_a_frame(page: str) -> Markup:
    """A whole page as one element, for notebooks: its styles and its policy stay inside."""
    return Markup(
        '<iframe srcdoc="{}" width="100%" height="720" frameborder="0" sandbox="allow-scripts allow-downloads" '
        'title="passk_guard"></iframe>'
    ).format(page)


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


class Paged:
    """What a page shows, as its `html`: saved to a file, and shown in a frame of a notebook."""

    kind: ClassVar[str]
    html: Any

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the page; only one of its kind is written over unless `force`.

        Raises:
            GuardError: another file is there, or it cannot be written, or plotly is not installed.
        """
        return save_page(self.html, path, kind=self.kind, force=force)

    def _repr_html_(self) -> str:
        return in_a_frame(self.html)


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(4000).decode("utf-8", errors="replace")
