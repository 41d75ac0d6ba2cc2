"""The held-out prompts: their source, which of them a refresh uses, whether training saw them, and their samples."""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passk_guard.probe.records import Rollouts
from passk_guard.utils.errors import GuardError
from passk_guard.utils.files import json_lines
from passk_guard.utils.text import brief

if TYPE_CHECKING:
    from passk_guard.probe.samplers import Sampler

Row = Mapping[str, Any]
_OTHER_NAMES = ("question", "problem", "instruction", "query", "input", "messages", "text")
_FEWEST_CLUSTERS = 3
_SHAPE = "a non-empty text or a list of chat messages with `role` and `content`"


class ProbeSet:
    """At least three different prompts held out from training, with the columns that the reward needs.

    Attributes:
        rows: the rows kept, in the order given.

    Args:
        rows: mappings with `prompt` (a non-empty text, or a list of messages with `role` and `content`; the same
            kind in all rows) and any other columns. A prompt that occurs again, up to case and white space, is
            dropped with a warning: the estimate pairs different prompts, and would pair it with itself.

    Raises:
        GuardError: a row of another form, rows of both kinds, or fewer than three different prompts.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        kept: dict[str, Row] = {}
        found = 0
        for found, row in enumerate(rows, start=1):
            _check_row(row, f"row {found - 1}")
            kept.setdefault(prompt_key(row["prompt"]), dict(row))
        self.rows: tuple[Row, ...] = tuple(kept.values())
        self._keys = tuple(kept)
        if len(kept) < 3:
            raise GuardError(
                f"Expected a probe of at least 3 different prompts, since the estimate compares prompts with one "
                f"another; found {len(kept)} in {found} rows. Pass 64 or more held-out prompts."
            )
        if len({isinstance(row["prompt"], str) for row in self.rows}) > 1:
            raise GuardError(
                "Expected probe prompts of one kind; found texts and lists of messages. Convert the texts to "
                '[{"role": "user", "content": text}], or apply the chat template to the messages.'
            )
        if (dropped := found - len(kept)) > 0:
            warnings.warn(
                f"passk_guard: dropped {dropped} of {found} probe prompts that occur twice, up to case and white "
                "space.",
                stacklevel=2,
            )

    @classmethod
    def of(cls, source: Any) -> ProbeSet:
        """Make a probe of a ProbeSet (returned as it is), a list of rows, a JSONL path or a datasets.Dataset."""
        if isinstance(source, cls):
            return source
        if isinstance(source, (str, Path)):
            return cls.from_jsonl(source)
        if isinstance(source, (list, tuple)):
            return cls.from_list(source)
        return cls.from_dataset(source)

    @classmethod
    def from_list(cls, rows: Sequence[Row]) -> ProbeSet:
        """Make a probe of these rows; see the class for their form and the errors."""
        return cls(rows)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> ProbeSet:
        """Make a probe of a file with one JSON object a line; empty lines are skipped.

        Raises:
            GuardError: no such file, or a line that is no JSON object with a prompt, naming file and line.
        """
        return cls(_read_jsonl(Path(path)))

    @classmethod
    def from_dataset(cls, dataset: Any) -> ProbeSet:
        """Make a probe of all rows of a datasets.Dataset, or of anything that has a length and iterates over rows.

        Raises:
            GuardError: several splits in one, or a stream, which has no length.
        """
        if isinstance(dataset, Mapping):
            raise GuardError(f"Expected one split as probe; found the splits {list(dataset)}. Pass one of them.")
        if not hasattr(dataset, "__iter__") or not hasattr(dataset, "__len__"):
            raise GuardError(
                f"Expected a dataset, a list of rows or a JSONL path as probe; found {type(dataset).__name__}, which "
                "has no length or no rows. Pass a list: list(stream.take(256))."
            )
        return cls(dataset)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def key(self, index: int) -> str:
        """Identity of a prompt: `prompt_key` of row `index`."""
        return self._keys[index]

    def require_columns(self, names: Iterable[str]) -> None:
        """Raise GuardError unless every row has all these columns."""
        for name in names:
            lacking = sum(name not in row for row in self.rows)
            if lacking:
                raise GuardError(
                    f"Expected the column `{name}`, which the reward function needs, in every probe row; found it "
                    f"missing in {lacking} of {len(self)} (first row: {list(self.rows[0])}). Add it to the probe."
                )

    @property
    def chats(self) -> bool:
        """Whether the prompts are lists of messages."""
        return not isinstance(self.rows[0]["prompt"], str)

    def labels(self, setting: str, column: str) -> list[str]:
        """The value of a column in each row, as text.

        Raises:
            GuardError: a row without it, naming the setting that asks for it.
        """
        if missing := [i for i, row in enumerate(self.rows) if row.get(column) is None]:
            raise GuardError(
                f"Expected the column {setting}={column!r} in every row of the probe; found none in row {missing[0]}, "
                f"whose columns are {sorted(map(str, self.rows[missing[0]]))}."
            )
        return [str(row[column]) for row in self.rows]

    def clusters(self, column: str) -> list[str]:
        """The values of `cluster_by`.

        Raises:
            GuardError: as `labels`, or fewer than three different values, since prompts of one are not paired.
        """
        found = self.labels("cluster_by", column)
        if (apart := len(set(found))) < _FEWEST_CLUSTERS:
            raise GuardError(
                f"Expected at least {_FEWEST_CLUSTERS} different values in the column cluster_by={column!r}; found "
                f"{apart}. Prompts of one value are not compared: pass more sources, or leave `cluster_by` out."
            )
        return found

    def overlap(self, training: Any, render: Callable[[Any], Iterable[str]] = lambda messages: ()) -> list[int] | None:
        """Find the probe prompts that also occur among the training prompts, by `prompt_key`.

        The `prompt` column is read once, in batches, and no other column where the dataset allows it.

        Args:
            training: rows, or a dataset with a `prompt` column.
            render: the texts that a list of messages may stand for, where one side has messages and the other texts.

        Returns:
            The indices in rising order, or None when it cannot be checked: a stream without a length, or no prompts.
        """
        columns = getattr(training, "column_names", None)
        if not hasattr(training, "__len__") or (columns is not None and "prompt" not in columns):
            return None
        index = {key: i for i, key in enumerate(self._keys)}
        if self.chats:
            index |= {prompt_key(text): i for i, row in enumerate(self.rows) for text in render(row["prompt"])}
        found = set()
        for prompt in filter(is_prompt, _prompts(training)):
            texts = () if self.chats or isinstance(prompt, str) else render(prompt)
            found |= {index[key] for key in map(prompt_key, (prompt, *texts)) if key in index}
        return sorted(found)

    def of_another_kind(self, training: Any) -> bool:
        """Whether the first training prompt that can be read is a text where these are messages, or the reverse."""
        try:
            prompt = training[0]["prompt"]
        except Exception:  # a stream, no rows, or no prompts
            return False
        return is_prompt(prompt) and isinstance(prompt, str) == self.chats

    def draw(self, refresh: int, size: int, seed: int) -> list[int]:
        """Choose the prompts of one refresh, as a pure function of the arguments: resuming needs no state.

        Refreshes walk through a random permutation, `size` prompts each, until all were used; the last refresh
        of the walk is filled up at random from the others, and the next one begins a new permutation.

        Args:
            refresh: number of the refresh, from 0.
            size: prompts wanted.
            seed: of the permutations.

        Returns:
            min(size, len(self)) different indices.

        Raises:
            GuardError: `refresh` < 0 or `size` < 1.
        """
        if refresh < 0 or size < 1:
            raise GuardError(f"Expected refresh >= 0 and size >= 1; found refresh={refresh}, size={size}.")
        size = min(size, len(self))
        epoch, position = divmod(refresh, -(-len(self) // size))
        generator = random.Random(f"{seed}/{epoch}")  # a text is hashed with SHA-512: the same on every machine
        order = generator.sample(range(len(self)), len(self))
        before, chosen = order[: position * size], order[position * size : (position + 1) * size]
        return chosen + generator.sample(before, size - len(chosen))


def prompt_key(prompt: Any) -> str:
    """Hash a prompt to 32 hexadecimal digits, the same for texts that differ in Unicode form (NFKC), space or case.

    Messages count by role and content.
    """
    if not isinstance(prompt, str):
        prompt = [{"role": message["role"], "content": message["content"]} for message in prompt]
    canonical = json.dumps(_normalised(prompt), sort_keys=True, ensure_ascii=False, default=repr)
    return hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def prompt_text(prompt: Any) -> str:
    """The prompt as one text; of a conversation each message after its role."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _normalised(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).casefold().split())
    if isinstance(value, Mapping):
        # Arrow fills the fields that one message has and another lacks with None.
        return {key: _normalised(v) for key, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_normalised(v) for v in value]
    return value


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, Mapping):
        raise GuardError(
            f"Expected mappings with a `prompt` as probe rows; found {type(row).__name__} in {where}. "
            'Pass {"prompt": text, ...}.'
        )
    if "prompt" not in row:
        likely = next((name for name in _OTHER_NAMES if name in row), "question")
        raise GuardError(
            f"Expected a `prompt` in every probe row; found only {list(row)} in {where}. Rename the column that is "
            f"one, of a dataset by `dataset.rename_column({likely!r}, 'prompt')`."
        )
    if not is_prompt(row["prompt"]):
        raise GuardError(f"Expected `prompt` to be {_SHAPE}; found {brief(row['prompt'])} in {where}.")


def is_prompt(prompt: Any) -> bool:
    """Whether it is a non-empty text or a list of chat messages."""
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in prompt)
    )


def _read_jsonl(path: Path) -> Iterator[Row]:
    for where, row in json_lines(path, "probe prompts"):
        _check_row(row, where)
        yield row


def _prompts(training: Any) -> Iterator[Any]:
    """The training prompts one by one; of a datasets.Dataset only this column is read, so no image is decoded."""
    if hasattr(training, "select_columns") and hasattr(training, "iter"):
        for batch in training.select_columns(["prompt"]).iter(batch_size=1000):
            yield from batch["prompt"]
        return
    for i in range(len(training)):
        row = training[i]
        if isinstance(row, Mapping):
            yield row.get("prompt")


@dataclass(frozen=True)
class HeldOut:
    """Samples the prompts of a probe set.

    Attributes:
        probe: the prompts.
        sampler: samples the completions.
        size: m, prompts of a refresh over all ranks.
        num_samples: n, completions of each.
        seed: of the choice of prompts and of the sampling.
        clusters: what each prompt of the probe comes from; empty where all are independent.
    """

    probe: ProbeSet
    sampler: Sampler
    size: int
    num_samples: int
    seed: int
    clusters: Sequence[str] = ()

    @property
    def summary(self) -> str:
        """For a log line: how much is sampled of how many prompts."""
        size = min(self.size, len(self.probe))
        return f"{size} of {len(self.probe)} held-out prompts x {self.num_samples} samples"

    @property
    def share(self) -> float:
        """Of the probe set that a refresh asks, in (0, 1]."""
        return min(1.0, self.size / len(self.probe))

    def keys(self, refresh: int) -> list[Hashable]:
        """Identities of the m prompts of a refresh, in order."""
        return [self.probe.key(i) for i in self.probe.draw(refresh, self.size, self.seed)]

    def independent(self, keys: Sequence[Hashable]) -> list[Hashable]:
        """For each of these prompts its own name, or that of its cluster: prompts of one name are not independent."""
        return [self._cluster_of.get(str(key), key) for key in keys]

    @cached_property
    def _cluster_of(self) -> dict[str, str]:
        return {self.probe.key(i): cluster for i, cluster in enumerate(self.clusters)}

    def rollouts(self, refresh: int, rank: int, num_ranks: int) -> Rollouts:
        """Sample this rank's share of a refresh: every `num_ranks`-th prompt, n completions each.

        Ranks sample equally many prompts, since parts of one model must run the same number of steps. Where the
        prompts do not divide, some are sampled once more as fillers, which are counted nowhere.
        """
        chosen = self.probe.draw(refresh, self.size, self.seed)
        places = range(rank, rank + num_ranks * -(-len(chosen) // num_ranks), num_ranks)
        rows = [self.probe[chosen[place % len(chosen)]] for place in places]
        samples = self.sampler.sample(rows, self.num_samples, _mix(self.seed, refresh, rank))
        return Rollouts(
            rows=_repeat(rows, self.num_samples),
            prompt_index=_repeat([place if place < len(chosen) else -1 for place in places], self.num_samples),
            prompt_ids=samples.prompt_ids,
            completion_ids=samples.completion_ids,
            completions=samples.completions,
            num_prompts=len(chosen),
            temperature=self.sampler.temperature,
            policy_masks=samples.policy_masks,
            columns=samples.columns,
            log_probs=samples.log_probs,
            lost=samples.lost,
        )


def _repeat(items: Sequence[Any], times: int) -> list[Any]:
    return [item for item in items for _ in range(times)]


def _mix(seed: int, refresh: int, rank: int) -> int:
    """One seed below 2**63 from three numbers, different for any two triples that a run can meet."""
    return (seed * 1_000_003 + refresh) * 65_536 + rank & (2**63 - 1)
