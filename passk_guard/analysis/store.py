"""The output folder: results, and the completions of each prompt, from which an interrupted run continues."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from passk_guard.reporting.html.page import page_kind
from passk_guard.utils.errors import GuardError
from passk_guard.utils.files import cut_unfinished, write_whole
from passk_guard.utils.text import describe_invalid, first_of, one_line

JSON_NAME, PAGE_NAME, ROLLOUTS_NAME = "analysis.json", "analysis.html", "rollouts"
PAGE_KIND = "analysis"
_SETTINGS = "settings.json"


def check_folder(folder: Path, fingerprint: str, settings: dict[str, Any], *, force: bool) -> None:
    """Refuse a folder whose content this run would mix with or overwrite.

    Accepted are a folder that does not exist, an empty one, one that an interrupted run left, and a finished analysis
    of the same model and settings, which is written again.

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
        raise GuardError(
            f"Expected an empty output folder, or one of an earlier analysis; found {first_of(foreign, 3)} in "
            f"{str(folder)!r}. Pass another folder, or --force (force=True) to write next to them."
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


def model_fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits from the model's config and from every parameter and buffer: name, dtype, shape, bytes.

    The loaded model is read and not its files, so that adapters and the dtype count. About a second for a gigabyte.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        # Where a model was loaded from, and by which version, does not change what it computes.
        settings = {n: v for n, v in config.to_dict().items() if n not in ("_name_or_path", "transformers_version")}
        digest.update(_canonical(settings))
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def keys_fingerprint(keys: Sequence[str]) -> str:
    """32 hexadecimal digits from the keys of the prompts, in order."""
    return hashlib.blake2b(_canonical(list(keys)), digest_size=16).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=repr).encode()


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


Token = Annotated[int, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]


@dataclass(frozen=True)
class PromptRollouts:
    """All n completions of one prompt.

    Attributes:
        place: which prompt of the analysis, from 0.
        prompt_ids: its tokens.
        completion_ids: n lists of tokens.
        completions: n decoded completions, texts or lists of messages.
        policy_masks: as of `Rollouts`; None where the policy sampled every token.
    """

    place: Token
    prompt_ids: list[Token]
    completion_ids: list[list[Token]]
    completions: list[Text | list[dict[str, Any]]]
    policy_masks: list[list[Token]] | None = None


def _as_many_texts(kept: PromptRollouts) -> PromptRollouts:
    if len(kept.completion_ids) != len(kept.completions):
        raise ValueError("counts that do not fit")
    return kept


_ROLLOUTS = TypeAdapter(Annotated[PromptRollouts, AfterValidator(_as_many_texts)])


class RolloutStore:
    """The folder of kept completions. Without a folder nothing is kept.

    Each rank appends to a separate file and reads those of all ranks, so that a run can continue with another number of
    processes.

    Args:
        folder: of the completions, or None.
        rank: of this process.
    """

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self.folder = folder
        self._own = None if folder is None else folder / f"rank{rank}.jsonl"

    def prepare(self, settings: Mapping[str, Any], *, force: bool = False) -> None:
        """Make the folder ready for samples of these settings. Called on the first rank alone.

        Args:
            settings: all that the samples depend on, the model's fingerprint included.
            force: drop what is kept where it does not fit.

        Raises:
            GuardError: the kept completions are of another model or other settings; names the difference.
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
        """Return what all ranks have kept, by place. A last line without its end is passed over.

        Raises:
            GuardError: a whole line that is damaged; names file and line.
        """
        return {kept.place: kept for path in self._files() for kept in _read(path)}

    def append(self, rollouts: Sequence[PromptRollouts]) -> None:
        """Append completions to this rank's file and flush them to disk."""
        if self._own is None:
            return
        lines = "".join(json.dumps(asdict(one)) + "\n" for one in rollouts)
        cut_unfinished(self._own)  # a line that a crash cut short would run into the next one
        with self._own.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def _files(self) -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob("rank*.jsonl"))

    def _differing(self, folder: Path, settings: dict[str, Any]) -> list[str]:
        """The settings in which the kept completions differ, in words."""
        if not any(path.stat().st_size for path in self._files()):
            return []
        try:
            kept = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
            return [_difference(name, kept[name], value) for name, value in settings.items() if kept[name] != value]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return [f"{_SETTINGS}, which names what they are of, is missing or unreadable"]


def _difference(name: str, kept: Any, wanted: Any) -> str:
    if name in ("model", "probe"):
        return {"model": "another model", "probe": "other prompts"}[name]
    return f"{name} {kept} and not {wanted}"


def _read(path: Path) -> Iterator[PromptRollouts]:
    data = path.read_bytes()
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            yield _ROLLOUTS.validate_python(json.loads(line))
        except (ValueError, RecursionError) as error:
            reason = describe_invalid(error) if isinstance(error, ValidationError) else one_line(str(error), 200)
            raise GuardError(
                f"Expected one prompt's completions on each line; found a damaged line {number} in {str(path)!r}: "
                f"{reason}. Remove the line (its prompt is sampled again), or the file."
            ) from None
