"""Rollouts that somebody else has dumped: one completion a row, as JSON lines or parquet. Needs neither model nor GPU.

verl's `trainer.rollout_data_dir` writes JSON lines of `input`, `output`, `gts`, `score` and `step`; TRL's
`log_completions` writes parquet of `step`, `prompt`, `completion`, `advantage` and a column for each reward function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passk_guard.probe.prompts import is_prompt, prompt_key, prompt_text
from passk_guard.utils.errors import GuardError
from passk_guard.utils.files import json_lines
from passk_guard.utils.text import brief, first_of

COLUMNS = {
    "prompt": "a non-empty text, a number that names it, or a list of chat messages",
    "correct": "true or false, or a reward, which is correct at or above the threshold; null for no verdict",
    "completion": "a text, tokens or a number that names it",
    "logprob": "a log-probability in nats, at most 0, or the list of those of the tokens",
    "logprob_new": "a log-probability in nats, at most 0, or the list of those of the tokens",
    "group": "a text or a number",
    "step": "a whole number",
}
"""What each is; the first two are needed."""
FEWEST_PROMPTS = 3
"""Over which errors are taken."""
_NEEDED = 2
_SCORES = "logprob", "logprob_new"
_MOST_GROUPS = 20
_ROUNDING = 1e-3


@dataclass
class DumpedPrompt:
    """The rollouts of one prompt, in the order of the file.

    Attributes:
        text: the prompt.
        group, cluster: labels; None where the file has none.
        correct: 1 right, 0 wrong, -1 no verdict.
        log_ratios: log of the second policy's probability over that of the first.
        completions: what they are, as something that can be compared.
    """

    text: str
    group: str | None
    cluster: str | None
    correct: list[int] = field(default_factory=list)
    log_ratios: list[float] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        """n, rollouts with a verdict."""
        return sum(verdict >= 0 for verdict in self.correct)

    @property
    def num_correct(self) -> int:
        """c, those that are right."""
        return self.correct.count(1)


def as_matrices(prompts: Sequence[DumpedPrompt]) -> tuple[Tensor, Tensor, Tensor]:
    """Verdicts, log ratios and which entries there are, each [m, n]; log ratios of 0 where the file has none."""
    width = max(len(prompt.correct) for prompt in prompts)

    def matrix(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype)

    there = matrix([[1] * len(prompt.correct) for prompt in prompts], torch.bool)
    verdicts = matrix([prompt.correct for prompt in prompts], torch.int64)
    return verdicts, matrix([prompt.log_ratios for prompt in prompts], torch.float64), there


def read_rollouts(
    path: str | Path, columns: Mapping[str, str] | None = None, *, threshold: float = 1.0, cluster_by: str | None = None
) -> list[DumpedPrompt]:
    """The prompts of a file with their rollouts, in the order of first sight.

    Args:
        path: JSON lines, or parquet where the name ends in `.parquet`, which takes pyarrow.
        columns: the file's name of each of `COLUMNS` that has another there. Those that are not named and not in the
            first row are left out; all other columns of the file are passed over.
        threshold: rewards at or above it are correct.
        cluster_by: column of the file whose prompts of one value are not independent.

    Raises:
        GuardError: no such file, a row that cannot be read or lacks a column, naming the row and what to pass; rollouts
            of several steps; one log-probability without the other; fewer than 3 prompts; more than 20 groups.
    """
    path, prompts = Path(path), dict[str, DumpedPrompt]()
    names: dict[str, str] = {}
    step: Any = None
    for where, row in _rows(path):
        if not isinstance(row, Mapping):
            raise GuardError(f"Expected an object with a column for each value; found {brief(row)} in {where}.")
        if not names:
            names = _names(columns or {}, row, cluster_by, where)
        found = {name: _column(row, column, where) for name, column in names.items()}
        if "step" in found and (step := found["step"] if step is None else step) != found["step"]:
            raise GuardError(
                f"Expected rollouts of one step, since those of two are of two policies; found {brief(step)} and, in "
                f"{where}, {brief(found['step'])} in the column {names['step']!r}. Pass a file of one step."
            )
        _add(prompts, found, threshold, where, names)
    kept = list(prompts.values())
    if len(kept) < FEWEST_PROMPTS:
        raise GuardError(
            f"Expected rollouts of at least {FEWEST_PROMPTS} different prompts, over which errors are taken; found "
            f"{len(kept)} in {path.name}."
        )
    if len(labels := {prompt.group for prompt in kept}) > _MOST_GROUPS:
        raise GuardError(
            f"Expected at most {_MOST_GROUPS} groups in the column {names['group']!r}; found {len(labels)}. Name a "
            "column of few values, such as a difficulty."
        )
    return kept


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix != ".parquet":
        yield from json_lines(path, "rollouts")
        return
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise GuardError(
            "Expected pyarrow, which reads parquet. pip install pyarrow, or write JSON lines, of a pandas table by "
            'table.to_json("rollouts.jsonl", orient="records", lines=True).'
        ) from None
    if not path.is_file():
        raise GuardError(f"Expected a parquet file of rollouts; found no file at {str(path)!r}.")
    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}, row {number}", row
    except ArrowException as error:
        raise GuardError(f"Expected a parquet file; {path.name} cannot be read: {error}.") from None


def _names(columns: Mapping[str, str], row: Mapping[str, Any], cluster_by: str | None, where: str) -> dict[str, str]:
    """The file's name of each column that it has."""
    if unknown := sorted(columns.keys() - COLUMNS.keys()):
        raise GuardError(f"Expected columns to be named among {', '.join(COLUMNS)}; found {brief(unknown[0])}.")
    names = {name: columns.get(name, name) for name in COLUMNS if name in columns or name in row}
    if "correct" not in names and "reward" in row:
        names["correct"] = "reward"
    for name in list(COLUMNS)[:_NEEDED]:
        if name not in names:
            raise GuardError(
                f"Expected a column `{name}`, {COLUMNS[name]}; found {first_of(map(brief, row), 8)} in {where}. Say "
                f"which one it is: --columns {name}=..., or columns={{{name!r}: ...}}."
            )
    if ("logprob" in names) != ("logprob_new" in names):
        raise GuardError(
            "Expected both `logprob`, of the policy that sampled, and `logprob_new`, of the one that scored the same "
            f"completions again, or neither; found one of them in {where}. Name the other with --columns, or leave "
            "both out of the file."
        )
    return names if cluster_by is None else names | {"cluster": cluster_by}


def _column(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise GuardError(
            f"Expected the column {brief(column)} in every row; found {first_of(map(brief, row), 8)} in {where}."
        )
    return row[column]


def _add(
    prompts: dict[str, DumpedPrompt], found: Mapping[str, Any], threshold: float, where: str, names: Mapping[str, str]
) -> None:
    """Put one row to the others of its prompt."""

    def refuse(name: str, why: str = "") -> GuardError:
        expected = COLUMNS.get(name, "a text or a number")
        told = f"Expected {brief(names[name])} to be {expected}; found {brief(found[name])} in {where}"
        return GuardError(f"{told}. {why}".rstrip())

    prompt = found["prompt"]
    prompt = str(prompt) if isinstance(prompt, int) and not isinstance(prompt, bool) else prompt
    if not is_prompt(prompt):
        raise refuse("prompt")
    labels: dict[str, str | None] = {}
    for name in ("group", "cluster"):
        if name in found and not isinstance(found[name], (str, int, float)):
            raise refuse(name)
        labels[name] = str(found[name]) if name in found else None
    new = DumpedPrompt(prompt_text(prompt), labels["group"], labels["cluster"])
    one = prompts.setdefault(prompt_key(prompt), new)
    for name, label in labels.items():
        if label != getattr(one, name):
            raise refuse(name, f"Rows of this prompt before it have {brief(getattr(one, name))}: a prompt has one.")
    verdict = found["correct"]
    if verdict is None or verdict != verdict:
        one.correct.append(-1)
    elif isinstance(verdict, (bool, int, float)):
        one.correct.append(int(verdict if isinstance(verdict, bool) else verdict >= threshold))
    else:
        raise refuse("correct")
    if "completion" in found:
        one.completions.append(str(found["completion"]))
    if "logprob" not in found:
        return
    of_tokens = [[value] if not isinstance(value, list) else value for value in (found[name] for name in _SCORES)]
    for name, parts in zip(_SCORES, of_tokens, strict=True):
        numbers = bool(parts) and all(type(part) in (int, float) for part in parts)
        if not numbers or not -math.inf < sum(parts) <= _ROUNDING:
            raise refuse(name)
    if len(of_tokens[0]) != len(of_tokens[1]):
        raise refuse("logprob", f"{brief(names['logprob_new'])} has {len(of_tokens[1])} tokens; it has as many.")
    one.log_ratios.append(sum(after - before for before, after in zip(*of_tokens, strict=True)))
