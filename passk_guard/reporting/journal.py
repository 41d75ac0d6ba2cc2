"""`passk_guard.jsonl`: one JSON object a line, for every refresh and every change of verdict; written and read back."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from passk_guard.utils.errors import GuardError
from passk_guard.utils.files import cut_unfinished, refuse_links
from passk_guard.utils.text import one_line

logger = logging.getLogger(__name__)

JOURNAL_NAME = "passk_guard.jsonl"
Event = Mapping[str, Any]
RUN = r"^([0-9a-f]{12})?$"
"""What identifies a run, in its journal and its checkpoints; empty where nothing does."""
_Scalar = bool | int | float | str | None
_EARLIER_NAMES = {"void": "failed_refresh"}  # of events, in journals of version 0.1.0 before its release
# What a step writes, in this order: numbers of the steps before it, which are older than its checkpoint; then, where a
# run starts there, its start; the refresh; the change of verdict after it.
_ORDER = {"steps": 0, "start": 1, "refresh": 2, "failed_refresh": 2, "state": 3, "change": 4, "outcome": 5}


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
        """Append one event with the `time` (UTC); numbers that are not finite are written as null."""
        if self.path is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = json.dumps({"event": event, "step": step} | {k: _plain(v) for k, v in fields.items()} | {"time": now})
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


class _Line(BaseModel):
    """What must hold of a line; numbers, by whatever name, are checked where they are drawn."""

    model_config = ConfigDict(strict=True, extra="allow")

    event: str
    step: int = Field(ge=0, lt=2**53)  # exact as a float, which charts are drawn with
    reason: str | None = None
    message: str | None = None
    to: str | None = None
    settings: dict[str, _Scalar | list[_Scalar] | dict[str, _Scalar]] = {}
    run: str | None = None


@dataclass(frozen=True)
class RunJournal:
    """The events of one run, by rising step: those of what became the run.

    A run that was killed leaves events after the checkpoint from which it goes on. A start at step s replaces every
    event before it in the file that belongs to a later moment than that checkpoint, and every event of another run.

    Attributes:
        path: of the file.
        events: objects with `event` and `step`; kinds that are not known here are left out.
        settings: of the newest start of the run, empty where the journal holds none.
        unfinished: the last line was half written and is left out: the run goes on, or it crashed.
        restarts: steps at which the run began again, from a checkpoint or from the start.
    """

    path: Path
    events: Sequence[Event]
    settings: Mapping[str, Any] = field(default_factory=dict)
    unfinished: bool = False
    restarts: Sequence[int] = ()

    def of(self, *kinds: str) -> list[Event]:
        """The events of these kinds: "refresh", "failed_refresh", "state", "steps"."""
        return [event for event in self.events if event["event"] in kinds]


def read_journal(run_dir: str | Path) -> RunJournal:
    """Read the journal of a run, also while the run that writes it goes on.

    Args:
        run_dir: the run's output folder, or the JSONL file itself.

    Raises:
        GuardError: no such folder, no journal in it, none that can be read, no event in it, or a line before the last
            that is not an event as the guard writes it; its line number is named.
    """
    folder = Path(run_dir)
    path = folder / JOURNAL_NAME if folder.is_dir() else folder
    if not folder.exists():
        raise GuardError(f"Expected the output folder of a run; found no {run_dir}.")
    if not path.exists():
        raise GuardError(f"Expected `{JOURNAL_NAME}` in {run_dir}; found none. Pass the output_dir of a guarded run.")
    if not path.is_file():  # a pipe or a device may have no end
        raise GuardError(f"Expected a file of events; found something else at {path}.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise GuardError(f"Cannot read {path}: {error.strerror or error}.") from error
    events, unfinished = _parse(content, path)
    if not events:
        raise GuardError(f"Expected events in {path}; found none yet. The guard writes the first at its first refresh.")
    return _ordered(path, events, unfinished)


def run_of(path: Path) -> str | None:
    """The identity of the run whose start is the last in a journal; None where there is none."""
    run = None
    if not path.is_file():  # a pipe may have no end
        return None
    with suppress(OSError, ValueError, RecursionError), path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith('{"event": "start"'):
                run = str(json.loads(line).get("run", ""))
    return run if run and re.fullmatch(RUN, run) else None


def _parse(content: bytes, path: Path) -> tuple[list[Event], bool]:
    *lines, rest = content.split(b"\n")
    events = [_event(line, number, path) for number, line in enumerate(lines, 1) if line.strip()]
    if not rest.strip():
        return events, False
    try:
        return [*events, _event(rest, len(lines) + 1, path)], False
    except GuardError:  # the writer ends each line with a line feed: this one is not whole
        return events, True


def _event(line: bytes, number: int, path: Path) -> Event:
    where = f"{path}, line {number}"
    try:
        event = json.loads(line)
        _Line.model_validate(event)
    except ValidationError as error:
        first = error.errors()[0]
        found = one_line(f"{'.'.join(map(str, first['loc'])) or 'line'}: {first['msg']}", 200)
        raise GuardError(f"{where}: expected an event as the guard writes it ({found}). Remove that line.") from error
    except (ValueError, RecursionError) as error:  # ValueError also of bytes that are not UTF-8
        raise GuardError(f"{where}: not JSON ({error}). Remove or mend that line.") from error
    return event | {"event": _EARLIER_NAMES.get(event["event"], event["event"])}


def _ordered(path: Path, events: Sequence[Event], unfinished: bool) -> RunJournal:
    kept: list[Event] = []
    settings: Mapping[str, Any] = {}
    restarts: list[int] = []
    run: str | None = None
    for event in events:
        if event["event"] not in _ORDER:
            continue
        another = False
        if event["event"] == "start":
            settings = event.get("settings", settings)
            before, run = run, event.get("run") or run
            another = before is not None and before != run
        if kept and (event["event"] == "start" or _key(event) <= _key(kept[-1])):
            restarts.append(event["step"])
            kept = [earlier for earlier in kept if _key(earlier) < _key(event) and not another]
        if event["event"] != "start":
            kept.append(event)
    return RunJournal(path, kept, settings, unfinished, restarts)


def _key(event: Event) -> tuple[int, int]:
    return event["step"], _ORDER[event["event"]]
