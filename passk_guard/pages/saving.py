"""Writing a page to a file, whole, and over none that is not ours."""

from __future__ import annotations

from pathlib import Path

from passk_guard.pages.document import page_kind
from passk_guard.utils.errors import GuardError
from passk_guard.utils.files import write_whole


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
