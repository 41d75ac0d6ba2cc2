r"""The table of arXiv 2602.21189's language-model experiments on a checkpoint, beside our unbiased estimate.

    python -m examples.paper_protocol MODEL_DIR --probe probe.jsonl --correct module:function --out DIR
        [--k 1,2,4,8,16] [--samples 32] [--delta-1 0.25] [--delta-2 0.75] [--max-new-tokens 256]

The table is printed for the gradients of all trainable parameters and of the last hidden layer, from the same samples.
They are kept in DIR, so that a second call samples nothing.

The paper's quantities, from n samples with c correct, p-hat = c/n:

- hard prompts p-hat <= delta_1, easy ones p-hat >= delta_2, and their counts;
- plug-in weights $\hat w_k = k (1 - \hat p)^{k-1}$, which see the sample they weigh and shrink a conflict;
- the kernel of Sec. 3 as it is written there, $\kappa(x, x') = E[r(x,y) r(x',y') \langle s(x,y), s(x',y') \rangle]$,
  so $\hat\kappa = \langle S^+_x / n, S^+_{x'} / n' \rangle$: no baseline, and wrong samples do not enter;
- the inner product summed over all pairs, a prompt with itself included:
  $\frac{1}{m^2} \sum_{x, x'} \hat w_k(x) \hat\kappa(x, x')$, and its parts by the group that x belongs to.

What is our reading: the text at hand gives neither the thresholds' values, nor whether prompts between them are
summed. The defaults 0.25 and 0.75 are ours, and the parts are shown apart, so that either sum can be formed. "Last
hidden layer" is read as in `passk_guard.analysis.load`. Prompts that are always solved enter with a zero gradient:
theirs is zero in expectation, and their samples are not differentiated.

The figure is biased: same-prompt pairs push it up, plug-in weights push it to zero. It is here to be compared with the
paper's numbers. What to believe is the U-statistic beside it. Left out: single prompts and the kernel, which
`passk-guard analyze` shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passk_guard.analysis import Settings
from passk_guard.analysis.estimates import jackknife_error, with_error
from passk_guard.analysis.load import import_function, load_model, load_tokenizer
from passk_guard.analysis.measure import cosine_of, estimate_each, inner_product_of
from passk_guard.analysis.results import Number
from passk_guard.analysis.run import measure
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.ustatistics import prompt_kernel
from passk_guard.passk.closed_forms import passk_weight


@dataclass(frozen=True)
class Thresholds:
    """A prompt is hard for p-hat <= delta_1 and easy for p-hat >= delta_2."""

    delta_1: float = 0.25
    delta_2: float = 0.75

    def groups(self, probe: ProbeGram) -> tuple[Tensor, Tensor, Tensor]:
        """[m] bool each: hard, easy and neither."""
        rate = probe.num_correct.double() / probe.num_samples
        hard, easy = rate <= self.delta_1, rate >= self.delta_2
        return hard, easy, ~hard & ~easy


@dataclass(frozen=True)
class Row:
    """One k: `paper` as the paper sums it, its parts by group, and `ours` with the `cosine` and its `status`."""

    k: int
    paper: Number
    hard: Number
    easy: Number
    middle: Number
    ours: Number
    cosine: Number
    status: str


def paper_kernel(probe: ProbeGram, k: int) -> Tensor:
    """[m, m] plug-in w_k(x) kappa(x, x'): the terms of the paper's sum."""
    share = 1.0 / probe.num_samples.double()
    weight = passk_weight(probe.num_correct.double() * share, k)
    nothing = torch.zeros_like(share)
    return prompt_kernel(probe, torch.cat([weight * share, nothing]), torch.cat([share, nothing]))


def mean_over_pairs(terms: Tensor, left: Tensor) -> tuple[float, float]:
    """(1/m^2) times the sum of the rows of `terms` [m, m] that `left` [m] picks, and its jackknife standard error."""
    m = terms.shape[0]
    picked = terms * left.double()[:, None]
    total = picked.sum()
    without = (total - picked.sum(1) - picked.sum(0) + picked.diagonal()) / (m - 1) ** 2
    return float(total) / m**2, jackknife_error(without)


def paper_rows(probe: ProbeGram, settings: Settings, thresholds: Thresholds) -> list[Row]:
    """A row for each k above 1, from one Gram matrix; none below two prompts."""
    m = probe.num_samples.numel()
    if m < 2:
        return []
    quantile = student_t_quantile((1 + settings.confidence) / 2, m - 1)
    masks = (torch.ones(m, dtype=torch.bool), *thresholds.groups(probe))
    rows = []
    for k, estimate in estimate_each(probe, settings).items():
        terms = paper_kernel(probe, k)
        sums = (with_error(*mean_over_pairs(terms, mask), quantile) for mask in masks)
        rows.append(Row(k, *sums, inner_product_of(estimate), cosine_of(estimate), estimate.status))
    return rows


def measure_both(
    model: Any, tokenizer: Any, probe: Any, correct: Any, settings: Settings, **options: Any
) -> dict[str, ProbeGram]:
    """The Gram matrix by parameters: all trainable ones and the last hidden layer. Options as for `analyze`."""
    each = [Settings(**(settings.to_dict() | {"last_layer": last})) for last in (False, True)]
    runs = [measure(model, tokenizer, probe, correct, one, **options) for one in each]
    return {run.sketch.parameters: run.refresh.probe for run in runs}


def print_table(probes: dict[str, ProbeGram], settings: Settings, thresholds: Thresholds) -> None:
    """The counts of prompts, and one line for each set of parameters and each k."""
    hard, easy, middle = (int(group.sum()) for group in thresholds.groups(next(iter(probes.values()))))
    print(
        f"{hard} hard prompts (p-hat <= {thresholds.delta_1:g}), {easy} easy (p-hat >= {thresholds.delta_2:g}),", end=""
    )
    print(f" {middle} in between; +- is the standard error")
    heads = ("the paper's sum", "of it hard", "of it easy", "of it between", "ours, unbiased", "cosine, ours")
    print(f"{'gradients with respect to':26} {'k':>3}", *(f"{head:>20}" for head in heads), " status")
    for name, probe in probes.items():
        for row in paper_rows(probe, settings, thresholds):
            cells = (row.paper, row.hard, row.easy, row.middle, row.ours, row.cosine)
            print(f"{name:26} {row.k:3}", *(f"{_text(cell):>20}" for cell in cells), f" {row.status}")


def _text(number: Number) -> str:
    return "undetermined" if number.value is None else f"{number.value:.2g} +- {number.standard_error:.1g}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--probe", type=Path, required=True)
    parser.add_argument("--correct", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--k", default="1,2,4,8,16")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--delta-1", type=float, default=0.25)
    parser.add_argument("--delta-2", type=float, default=0.75)
    given = parser.parse_args(arguments)
    if not 0 <= given.delta_1 < given.delta_2 <= 1:
        parser.error(f"expected 0 <= delta-1 < delta-2 <= 1; found {given.delta_1:g} and {given.delta_2:g}")
    ks = [int(k) for k in given.k.split(",")]
    settings = Settings(ks=ks, num_samples=given.samples, max_new_tokens=given.max_new_tokens)
    model, tokenizer = load_model(given.model), load_tokenizer(given.model)
    correct = import_function(given.correct)
    probes = measure_both(model, tokenizer, given.probe, correct, settings, out=given.out)
    print_table(probes, settings, Thresholds(given.delta_1, given.delta_2))


if __name__ == "__main__":
    main()
