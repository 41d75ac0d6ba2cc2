"""The file of results: what is there is kept, and what is missing is added, one measurement at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

Record = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """What is asked for, in the words of the records that answer it, and how they are made."""

    asked: Record
    take: Callable[[], list[Record]]

    def answered(self, records: Iterable[Record]) -> bool:
        """Records without a `seed` are of seed 0, before there was a choice."""
        return any(self.asked.items() <= ({"seed": 0} | record).items() for record in records)


def read(path: Path) -> list[Record]:
    """The records in a file of JSON lines; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def take_missing(measurements: list[Measurement], path: Path) -> int:
    """Take what the file does not answer yet, and add it; how many those were.

    The records of a measurement come into the file together: the file is written under another name and renamed.
    """
    records = read(path)
    missing = [measurement for measurement in measurements if not measurement.answered(records)]
    path.parent.mkdir(parents=True, exist_ok=True)
    for measurement in tqdm(missing, desc="calibration"):
        records += [measurement.asked | record for record in measurement.take()]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in records))
        os.replace(partial, path)
    return len(missing)
