"""The probe prompt by prompt: how often it is solved, how pass@k weighs it, and whom it pulls against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from passk_guard.analysis.estimates import at_k, kernel_of, mixed, off_diagonal_rows, wilson
from passk_guard.analysis.results import Number, Prompt
from passk_guard.estimation.records import ProbeGram
from passk_guard.passk.closed_forms import passk_weight, unbiased_passk_weight

_HURT = 3


def prompt_records(
    probe: ProbeGram, k: int, names: Sequence[int], texts: Sequence[str], confidence: float
) -> list[Prompt]:
    r"""One record a prompt.

    $a(x) = \frac{1}{m-1} \sum_{x' \ne x} \langle g_1(x), g_1(x') \rangle$, and the weighted agreement is the same
    with g_k(x) on the left. Their standard errors are over x': what other prompts a probe happens to hold.

    Args:
        probe: m prompts.
        k: of the weights.
        names: [m] places of the prompts.
        texts: [m] what they say.
        confidence: of the intervals.
    """
    one = at_k(probe, 1)
    agreement, agreement_error = off_diagonal_rows(kernel_of(probe, one, one))
    crossed = kernel_of(probe, at_k(probe, k), one)
    weighted, weighted_error = off_diagonal_rows(crossed)
    against = float(-weighted.clamp(max=0).sum())
    weights = unbiased_passk_weight(probe.num_samples, probe.num_correct, k).tolist()
    known = mixed(probe).tolist()

    def number(values: Tensor, errors: Tensor, i: int) -> Number:
        return Number(float(values[i]), float(errors[i])) if known[i] else Number()

    records = []
    for i, place in enumerate(names):
        n, c = int(probe.num_samples[i]), int(probe.num_correct[i])
        rate = wilson(c, n, confidence)
        records.append(
            Prompt(
                place=place,
                text=texts[i],
                num_samples=n,
                num_correct=c,
                pass_rate=rate,
                weight=_weight(weights[i], rate, k),
                agreement=number(agreement, agreement_error, i),
                weighted_agreement=number(weighted, weighted_error, i),
                share=_share(float(weighted[i]), float(weighted_error[i]), against) if known[i] else Number(0.0),
                hurts=_hurt(crossed[i], i, names) if known[i] else [],
            )
        )
    return records


def prompt_text(row: Mapping[str, Any]) -> str:
    """The prompt as one text; of a conversation each message after its role."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _weight(value: float, rate: Number, k: int) -> Number:
    """w_k falls with p from k = 2 on, so the ends of p's interval give those of the weight's."""
    low, high = (float(passk_weight(torch.tensor(p, dtype=torch.float64), k)) for p in (rate.high, rate.low))
    return Number(value, None, min(low, value), max(high, value))


def _share(weighted: float, error: float, against: float) -> Number:
    return Number(-weighted / against, error / against) if weighted < 0 < against else Number(0.0)


def _hurt(row: Tensor, own: int, names: Sequence[int]) -> list[tuple[int, float]]:
    worst = [i for i in row.argsort(stable=True)[: _HURT + 1].tolist() if i != own and row[i] < 0]
    return [(names[i], float(row[i])) for i in worst[:_HURT]]
