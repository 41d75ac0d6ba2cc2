"""`passk_guard.jsonl`: one JSON object a line, for every refresh and every change of verdict."""

from __future__ import annotations

import json
import logging
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from passk_guard.utils.files import cut_unfinished, refuse_links

logger = logging.getLogger(__name__)


class Journal:
    """Appends events to a JSONL file; a disk that refuses is reported once, tried again, and training goes on.

    Each line is written and closed whole, so that a crashed run leaves a file that reads up to its last line. What is
    left of a line that was cut short, by a full disk or a crash, is taken away before the next one is written.

    Args:
        path: of the file; its folder is made when the first event comes. None writes nothing (other ranks).
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._refused = False
        self._whole = False  # whether the file is known to end in a whole line

    def write(self, event: str, step: int, **fields: Any) -> None:
        """Append one event; numbers that are not finite are written as null."""
        if self.path is None:
            return
        line = json.dumps({"event": event, "step": step} | {k: _plain(v) for k, v in fields.items()})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            refuse_links(self.path)
            if not self._whole:
                cut_unfinished(self.path)
            self._whole = False
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._whole = True
        except OSError as error:
            if not self._refused:
                reason = str(error)  # an exception would hold the refresh where a handler keeps its records
                logger.warning(
                    "passk_guard: %s takes no more events, metrics go to the log only: %s", self.path, reason
                )
            with suppress(OSError):
                cut_unfinished(self.path)
        self._refused = not self._whole


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | bool | None) else str(value)
