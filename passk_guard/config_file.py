"""The guard's settings as a file: its JSON schema, and everything that is wrong with one."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from passk_guard.config import GuardConfig, read_settings
from passk_guard.utils.text import brief


def config_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of `GuardConfig`, with the help of each setting as its description."""
    schema = TypeAdapter(GuardConfig).json_schema()
    for field in dataclasses.fields(GuardConfig):
        schema["properties"][field.name]["description"] = field.metadata["help"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def config_problems(path: str | Path) -> list[str]:
    """What keeps a YAML or JSON file from being settings, one line each; empty where nothing does.

    As in `GuardConfig.from_yaml`, the settings are the whole file or what stands under `passk_guard:`.

    Raises:
        GuardError: no such file, none that can be read, neither YAML nor JSON, or not a mapping.
    """
    content = read_settings(Path(path))
    try:
        TypeAdapter(GuardConfig).validate_python(content)
    except ValidationError as error:
        return [_line(problem) for problem in error.errors()]
    return []


def _line(problem: Any) -> str:
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "unexpected_keyword_argument":
        return f"{name}: unknown setting{_meant(name)}"
    text = problem["msg"].removeprefix("Value error, ")
    if not name:
        return text
    # YAML 1.1 takes off, on, yes and no without quotes for booleans.
    hint = " (quote it in YAML)" if problem["type"] == "literal_error" and isinstance(problem["input"], bool) else ""
    return f"{name}: {text}; found {brief(problem['input'])}{hint}"


def _meant(name: str) -> str:
    known = [field.name for field in dataclasses.fields(GuardConfig)]
    plain = name.lower().replace("-", "_")
    close = [plain] if plain in known else difflib.get_close_matches(plain, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
