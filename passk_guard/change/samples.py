"""The completions of a sample, checked, and those of a prompt that recurs put together. Needs torch alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passk_guard.utils.clusters import numbered
from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import brief

_LARGEST_LOG = 700.0  # e^709 is the last float64


@dataclass(frozen=True)
class Samples:
    """M different prompts, n' samples at most of each.

    Attributes:
        log_ratios: [M, n'] float64, 0 where a sample does not count.
        right, counted: [M, n'] bool.
        scores: [M, n'] float64, 0 where a sample does not count: 1 for a right sample, or numbers of any kind.
        sampler: [M, n'] float64, 0 where a sample does not count: log of the old policy's probability over that of what
            was sampled from; zeros where that is the old policy.
        prompt: [m] int64, which of the M prompts each row of the input belongs to.
    """

    log_ratios: Tensor
    right: Tensor
    counted: Tensor
    prompt: Tensor
    sampler: Tensor
    scores: Tensor


def checked_samples(
    correct: Tensor,
    k: int,
    *,
    log_ratios: Tensor | None = None,
    sampler: Tensor | None = None,
    mask: Tensor | None = None,
    keys: Sequence[Hashable] | None = None,
    noise: float = 0.0,
    scores: Tensor | None = None,
) -> Samples:
    """The samples of `estimate_change`, which says what the arguments are and what is raised.

    `scores` [m, n] are finite numbers of the samples that count, in the place of their verdicts; None: the verdicts.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise GuardError(f"Expected a whole number `k` >= 1; found {brief(k)}.")
    verdicts = _matrix(correct, "correct")
    logs = torch.zeros(verdicts.shape) if log_ratios is None else _matrix(log_ratios, "log_ratios")
    apart = torch.zeros(verdicts.shape) if sampler is None else _matrix(sampler, "sampler")
    counts = torch.ones(verdicts.shape, dtype=torch.bool) if mask is None else _matrix(mask, "mask").bool()
    for name, given in (("log_ratios", logs), ("sampler", apart), ("mask", counts)):
        if given.shape != verdicts.shape:
            raise GuardError(
                f"Expected `{name}` of the shape of `correct`, {tuple(verdicts.shape)}; found {tuple(given.shape)}."
            )
    if not bool(((verdicts == 0) | (verdicts == 1) | (verdicts == -1) | ~counts).all()):
        raise GuardError(
            "Expected `correct` to hold 1 (right), 0 (wrong) and -1 (no verdict) only; found another value. Compare "
            "rewards with a threshold first."
        )
    counts = counts & (verdicts != -1)
    logs, apart = (torch.where(counts, x.double(), 0.0) for x in (logs, apart))
    for given in (logs, apart, logs + apart):
        _require_ratios(given)
    logs = torch.where(counts, logs - noise**2 / 2, 0.0)
    prompt = _numbered(keys, len(verdicts))
    right = (verdicts == 1) & counts
    values = right.double() if scores is None else torch.where(counts, scores.double(), 0.0)
    samples = _together(Samples(logs, right, counts, prompt, apart, values))
    if not bool(samples.counted.any(1).all()):
        row = int((samples.prompt == int((~samples.counted.any(1)).nonzero()[0])).nonzero()[0])
        raise GuardError(
            f"Expected a sample that counts of every prompt; found none in row {row}: each is masked or has no "
            "verdict. Leave the row out."
        )
    return samples


def _matrix(values: Tensor, name: str) -> Tensor:
    if not isinstance(values, Tensor) or values.ndim != 2 or values.is_complex() or values.shape[1] == 0:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise GuardError(f"Expected `{name}` to be a real tensor of shape [prompts, samples]; found {found}.")
    return values.detach().cpu()


def _require_ratios(logs: Tensor) -> None:
    bad = ~(logs.isfinite() & (logs <= _LARGEST_LOG))
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise GuardError(
            f"Expected finite `log_ratios` of at most {_LARGEST_LOG:g}; found {float(logs[row, column])} at row {row}, "
            f"sample {column}. Leave a sample without a score out by `mask`; where the policy moved so far, resample."
        )


def _numbered(keys: Sequence[Hashable] | None, rows: int) -> Tensor:
    """[m] number of each row's prompt, in order of first sight."""
    if keys is None:
        return torch.arange(rows)
    if len(keys) != rows:
        raise GuardError(f"Expected one name in `keys` for each of {rows} rows; found {len(keys)}.")
    return numbered(keys)


def _together(samples: Samples) -> Samples:
    """Rows of one prompt side by side, filled up with samples that do not count."""
    prompt, (rows, n) = samples.prompt, samples.counted.shape
    prompts = int(prompt.max()) + 1 if rows else 0
    if prompts == rows:
        return samples
    place = torch.tensor([int((prompt[:row] == prompt[row]).sum()) for row in range(rows)])
    width = int(place.max()) + 1

    def put(values: Tensor) -> Tensor:
        room = values.new_zeros(prompts, width, n)
        room[prompt, place] = values
        return room.reshape(prompts, width * n)

    return Samples(
        log_ratios=put(samples.log_ratios),
        right=put(samples.right),
        counted=put(samples.counted),
        prompt=prompt,
        sampler=put(samples.sampler),
        scores=put(samples.scores),
    )
