"""The guard's files in the user's folders: written whole or line by line, and never through a link.

A run's folder may have come from elsewhere, as an archive or on a shared disk. A link in it, in the place of one of the
guard's files, would turn a write into a change of whatever it points to. Folders may be links: those the user chose.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from passk_guard.utils.errors import GuardError

_BLOCK = 1 << 16
_LONGEST_LINE = 1 << 24


@contextmanager
def replacing(path: Path, partial: Path) -> Iterator[Path]:
    """Write a file at `partial`, beside `path`, that takes the place of `path`, or of a link there, on exit.

    What lies at `partial` before, of an earlier attempt or a link, is removed. After an error nothing is left there.

    Raises:
        OSError: it cannot be written.
    """
    try:
        partial.unlink(missing_ok=True)
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def json_lines(path: Path, what: str) -> Iterator[tuple[str, Any]]:
    """The value on each line of a file that is not empty, after the place of that line for an error text.

    Raises:
        GuardError: no such file, or a line that is not JSON in UTF-8, naming file and line. `what` says what is in it.
    """
    if not path.is_file():
        raise GuardError(f"Expected a JSONL file of {what}; found no file at {str(path)!r}.")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path.name}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield where, json.loads(text)
            except UnicodeDecodeError as error:
                raise GuardError(f"Expected a file in UTF-8; found other bytes in {where}: {error.reason}.") from None
            except (ValueError, RecursionError) as error:
                raise GuardError(
                    f"Expected one JSON object a line; found malformed JSON in {where}: {error}."
                ) from None


def write_whole(path: Path, text: str) -> None:
    """Write under a temporary name and rename: a reader never sees half a file, and a link there is replaced."""
    with replacing(path, path.with_name(f"{path.name}.{os.getpid()}.partial")) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def refuse_links(path: Path) -> None:
    """Raise OSError for a link, a pipe or a device in the place of a file that is to be appended to."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError("it is a link or no regular file, and the guard writes to its own files only")


def cut_unfinished(path: Path) -> None:
    """Shorten the file to its last whole line, where it does not end in one.

    Raises:
        OSError: it is a link or no regular file, it cannot be read or written, or it has no line to keep and is so long
            that it must be something else.
    """
    refuse_links(path)
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        start = end
        while start > 0:
            start = max(0, start - _BLOCK)
            file.seek(start)
            found = file.read(min(_BLOCK, end - start)).rfind(b"\n")
            if found >= 0:
                start += found + 1
                break
            if end - start > _LONGEST_LINE:
                raise OSError("the file has no lines: it is none of the guard's")
        if start < end:
            file.truncate(start)


def save_whole(content: Any, path: Path) -> None:
    """`torch.save` under another name, then rename: on a full disk nothing is left of it, and an older file stays.

    Raises:
        OSError, RuntimeError: it cannot be written; torch reports a full disk as a RuntimeError.
    """
    with replacing(path, path.with_name(path.name + ".partial")) as partial:
        torch.save(content, partial)
