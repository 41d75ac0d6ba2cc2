"""The output folder: nothing of the user's in it is overwritten unasked, and nothing is ever left half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from passk_guard.pages import page_kind
from passk_guard.pages.analysis_page import PAGE_KIND
from passk_guard.utils.errors import GuardError

JSON_NAME, PAGE_NAME, ROLLOUTS_NAME = "analysis.json", "analysis.html", "rollouts"


def check_folder(folder: Path, fingerprint: str, settings: dict[str, Any], *, force: bool) -> None:
    """Refuse a folder whose content this run would mix with or overwrite.

    A folder that does not exist, an empty one, and one that an interrupted run of ours left are fine. So is a
    finished analysis of the same model and settings, which is written once more.

    Args:
        folder: where the results go.
        fingerprint: of the model.
        settings: of this run, as JSON has them.
        force: accept anything but a file in place of the folder; the user's other files stay as they are.

    Raises:
        GuardError: naming what is in the way.
    """
    if folder.exists() and not folder.is_dir():
        raise GuardError(f"Expected a folder to write to; found a file at {str(folder)!r}. Pass another one.")
    if force or not folder.exists():
        return
    foreign = sorted(entry.name for entry in folder.iterdir() if not _ours(entry))
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise GuardError(
            f"Expected an empty output folder, or one of an earlier analysis; found {shown} in {str(folder)!r}. "
            "Pass another folder, or --force (force=True) to write next to them."
        )
    if (folder / JSON_NAME).exists():
        _check_finished(folder / JSON_NAME, fingerprint, settings)


def _ours(entry: Path) -> bool:
    if entry.name == PAGE_NAME:
        return entry.is_file() and page_kind(entry.read_text(encoding="utf-8", errors="replace"), PAGE_KIND)
    return entry.name in (JSON_NAME, ROLLOUTS_NAME)


def _check_finished(path: Path, fingerprint: str, settings: dict[str, Any]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(name for name in settings if found["settings"].get(name) != settings[name])
        differing += ["the model"] if found["model"]["fingerprint"] != fingerprint else []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        differing = ["everything: it is no analysis that can be read"]
    if differing:
        raise GuardError(
            f"Expected no other analysis in the output folder {str(path.parent)!r}; found {path.name}, which differs "
            f"in {', '.join(differing)}. Pass another folder, or --force (force=True) to overwrite it; samples that "
            "still fit are used again."
        )
