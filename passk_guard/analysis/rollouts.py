"""Completions on disk: one line a prompt, appended as they are sampled, and read back by the run that goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from passk_guard.utils.errors import GuardError
from passk_guard.utils.files import cut_unfinished, write_whole
from passk_guard.utils.text import one_line

_SETTINGS = "settings.json"


@dataclass(frozen=True)
class PromptRollouts:
    """All n completions of one prompt.

    Attributes:
        place: which prompt of the analysis, from 0.
        prompt_ids: its tokens.
        completion_ids: n lists of tokens.
        completions: n decoded completions, texts or lists of messages.
    """

    place: int
    prompt_ids: list[int]
    completion_ids: list[list[int]]
    completions: list[Any]


class RolloutStore:
    """The folder of kept completions; with no folder nothing is kept.

    Each rank appends to a file of its own and reads those of all ranks, so that a run can go on with another number
    of processes.

    Args:
        folder: of the completions, or None.
        rank: of this process.
    """

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self.folder = folder
        self._own = None if folder is None else folder / f"rank{rank}.jsonl"

    def prepare(self, settings: Mapping[str, Any], *, force: bool = False) -> None:
        """Make the folder ready for samples of these settings; called on the first rank alone.

        Args:
            settings: all that the samples depend on, the model's fingerprint included.
            force: drop what is kept where it does not fit.

        Raises:
            GuardError: completions are kept that another model or other settings gave; says which.
        """
        if self.folder is None:
            return
        differing = self._differing(self.folder, dict(settings))
        if differing and not force:
            raise GuardError(
                f"Expected the samples kept in {str(self.folder)!r} to be of this model and these settings; found "
                f"others: {'; '.join(differing)}. Pass another folder, or --force (force=True) to sample afresh."
            )
        if differing:
            for path in self._files():
                path.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / _SETTINGS, json.dumps(dict(settings), indent=1))

    def read(self) -> dict[int, PromptRollouts]:
        """What all ranks have kept, by place.

        A last line without its end, as a killed run leaves it, is passed over.

        Raises:
            GuardError: a whole line that is damaged; names file and line.
        """
        return {kept.place: kept for path in self._files() for kept in _read(path)}

    def append(self, rollouts: Sequence[PromptRollouts]) -> None:
        """Write completions down, so that they outlive this process."""
        if self._own is None:
            return
        lines = "".join(json.dumps(asdict(one)) + "\n" for one in rollouts)
        cut_unfinished(self._own)  # what a crash left of a line would otherwise run into the first one written here
        with self._own.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def _files(self) -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob("rank*.jsonl"))

    def _differing(self, folder: Path, settings: dict[str, Any]) -> list[str]:
        """In words, what the kept completions do not share with `settings`; nothing where there are none."""
        if not any(path.stat().st_size for path in self._files()):
            return []
        try:
            kept = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
            return [_difference(name, kept[name], value) for name, value in settings.items() if kept[name] != value]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return [f"{_SETTINGS}, which says what they are of, is missing or unreadable"]


def _difference(name: str, kept: Any, wanted: Any) -> str:
    if name in ("model", "probe"):
        return {"model": "another model", "probe": "other prompts"}[name]
    return f"{name} {kept} and not {wanted}"


def _check(kept: PromptRollouts) -> None:
    """Raises ValueError for what was never written; the ids themselves are checked against the model."""
    lists = (kept.prompt_ids, kept.completion_ids, kept.completions)
    if type(kept.place) is not int or not all(isinstance(one, list) for one in lists):
        raise ValueError("values of another kind")
    if len(kept.completion_ids) != len(kept.completions):
        raise ValueError("counts that do not fit")
    for ids in (kept.prompt_ids, *kept.completion_ids):
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ValueError("tokens that are no whole numbers")
    if not all(isinstance(text, str) or _is_a_message(text) for text in kept.completions):
        raise ValueError("completions that are no texts")


def _is_a_message(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


def _read(path: Path) -> Iterator[PromptRollouts]:
    data = path.read_bytes()
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            kept = PromptRollouts(**json.loads(line))
            _check(kept)
        except (ValueError, TypeError, RecursionError) as error:
            raise GuardError(
                f"Expected one prompt's completions a line; found a damaged line {number} in {str(path)!r}: "
                f"{one_line(str(error), 200)}. Remove the line (its prompt is sampled again), or the file."
            ) from None
        yield kept
