"""Which prompts of a pool a model solves sometimes: a few samples of many prompts, before a probe is chosen.

A prompt whose samples are all right or all wrong has a gradient estimate of zero. Screened once, a probe spends its
samples on the others. What is then estimated is a mean over prompts like those kept, no longer over the pool.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passk_guard.analysis.run import Job, choose_prompts, failure_as_error, generate_sampler
from passk_guard.analysis.settings import Settings
from passk_guard.analysis.store import RolloutStore
from passk_guard.probe.progress import wanted
from passk_guard.probe.refresh import count_verdicts
from passk_guard.probe.verifier import resolve_verifier
from passk_guard.utils.errors import GuardError
from passk_guard.utils.files import write_whole
from passk_guard.utils.isolation import seeded, untouched
from passk_guard.utils.ranks import Ranks
from passk_guard.utils.text import brief

_FEWEST_PROMPTS = 3  # of a probe


@dataclass(frozen=True)
class Screened:
    """What a screening keeps and drops.

    Attributes:
        rows: the rows of the prompts solved in some samples and missed in others, in the order given.
        never: prompts solved in no sample. always: prompts solved in every sample.
        unscored: prompts of which no sample has a verdict.
        num_samples: completions of each prompt.
    """

    rows: tuple[Mapping[str, Any], ...]
    never: int
    always: int
    unscored: int
    num_samples: int

    @property
    def text(self) -> str:
        """One paragraph: what was kept and dropped, and what an estimate from it speaks for."""
        of = len(self.rows) + self.never + self.always + self.unscored
        unscored = f", {self.unscored} without a verdict" if self.unscored else ""
        return (
            f"Kept {len(self.rows)} of {of} prompts, solved in some of {self.num_samples} samples and not in all. "
            f"Dropped {self.never} never solved, {self.always} always solved{unscored}. Estimates from the kept "
            f"prompts speak for prompts like these and not for all {of}: their pass rates are not those of the pool."
        )

    def to_dict(self) -> dict[str, int]:
        """Numbers of prompts: kept, and dropped by reason."""
        dropped = {"never_solved": self.never, "always_solved": self.always, "unscored": self.unscored}
        return {"kept": len(self.rows), **dropped, "num_samples": self.num_samples}

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the kept rows as JSONL, each as it was given.

        Raises:
            GuardError: a file is there and `force` is False, or a row that JSON cannot hold.
        """
        path = Path(path)
        refuse_existing(path, force=force)
        try:
            lines = [json.dumps(dict(row), allow_nan=False) + "\n" for row in self.rows]
        except (TypeError, ValueError) as error:
            raise GuardError(f"Expected rows that JSON can hold; {brief(str(error))}. Drop that column.") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(lines))


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise GuardError for a folder, or for a file that nobody said may be replaced."""
    if path.is_dir() or (path.exists() and not force):
        raise GuardError(
            f"Expected a new file for the kept prompts; found {'a folder' if path.is_dir() else 'a file'} at "
            f"{str(path)!r}. Name another one, or replace a file with --force."
        )


def screen(
    model: Any, tokenizer: Any, pool: Any, correct: Any, *, progress: bool | None = None, **settings: Any
) -> Screened:
    """Keep the prompts that a model solves in some of n samples and not in all.

    A prompt of pass rate p is dropped with probability p^n + (1 - p)^n. With several processes every rank calls this
    with a whole model, prompts are shared out, and every rank gets the same.

    Args:
        model, tokenizer, correct, progress: as for `analyze`.
        pool: the prompts, as its `probe`.
        settings: fields of `Settings` that sampling needs: `num_samples` (4 by default), `prompts`, `temperature`, ...

    Raises:
        GuardError: as `analyze`, or fewer than three prompts are left.
    """
    chosen = Settings(**{"num_samples": 4, "ks": (1,)} | settings)
    verifier = resolve_verifier(correct, threshold=chosen.correct_threshold)
    prompts = choose_prompts(pool, verifier, chosen)
    sampler = generate_sampler(model, tokenizer, chosen)
    sampler.check_lengths(prompts.rows)
    ranks = Ranks(next(model.parameters()).device)
    job = Job(model, tokenizer, prompts, verifier, sampler, chosen, ranks, wanted(progress, ranks))
    with failure_as_error(), untouched(model, tokenizer), seeded(chosen.seed):
        samples, right = count_verdicts(*job.answers(RolloutStore(None)), ranks)
    some = (right > 0) & (right < samples)
    kept = tuple(row for row, keep in zip(prompts.rows, some.tolist(), strict=True) if keep)
    never, always = int(((right == 0) & (samples > 0)).sum()), int(((right == samples) & (samples > 0)).sum())
    found = Screened(kept, never, always, int((samples == 0).sum()), chosen.num_samples)
    if len(kept) < _FEWEST_PROMPTS:
        raise GuardError(
            f"Expected at least {_FEWEST_PROMPTS} prompts that the model solves sometimes; found {len(kept)}, "
            f"{never} never solved and {always} always solved in {chosen.num_samples} samples each. Pass more "
            "prompts, others, or more samples."
        )
    return found
