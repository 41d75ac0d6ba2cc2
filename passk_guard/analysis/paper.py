r"""The table of arXiv 2602.21189's language-model experiments, beside our unbiased figure.

The paper's quantities, from n samples with c correct, p-hat = c/n:

- hard prompts p-hat <= delta_1, easy ones p-hat >= delta_2, and their counts;
- plug-in weights $\hat w_k = k (1 - \hat p)^{k-1}$, which see the sample they weigh and shrink a conflict;
- the kernel of Sec. 3 as it is written there, $\kappa(x, x') = E[r(x,y) r(x',y') \langle s(x,y), s(x',y') \rangle]$,
  so $\hat\kappa = \langle S^+_x / n, S^+_{x'} / n' \rangle$: no baseline, and wrong samples do not enter;
- the inner product summed over all pairs, a prompt with itself included:
  $\frac{1}{m^2} \sum_{x, x'} \hat w_k(x) \hat\kappa(x, x')$, and its parts by the group that x belongs to.

What is our reading: the text at hand gives neither the thresholds' values, nor whether prompts between them are
summed. The defaults 0.25 and 0.75 are ours, and the parts are shown apart, so that either sum can be formed. "Last
hidden layer" is read as in `analysis.last_layer`. Prompts that are always solved enter with a zero gradient: theirs is
zero in expectation, and their samples are not differentiated.

The figure is biased: same-prompt pairs push it up, plug-in weights push it to zero. It is here to be compared with the
paper's numbers. What to believe is the U-statistic beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from passk_guard.analysis.estimates import jackknife_error, kernel_of, with_error
from passk_guard.analysis.measure import cosine_of, estimate_each, inner_product_of
from passk_guard.analysis.results import PaperRow, PaperTable
from passk_guard.analysis.settings import Settings
from passk_guard.estimation.intervals import student_t_quantile
from passk_guard.estimation.records import ProbeGram
from passk_guard.passk.closed_forms import passk_weight


def paper_table(probes: dict[str, ProbeGram], settings: Settings) -> PaperTable:
    """The table for each set of parameters and each k above 1.

    Args:
        probes: name of a set of parameters -> Gram matrix of the same samples.
        settings: thresholds, ks and confidence.
    """
    rows = [row for name, probe in probes.items() for row in _rows(name, probe, settings)]
    hard, easy, middle = groups(next(iter(probes.values())), settings.delta_1, settings.delta_2)
    counts = (int(hard.sum()), int(easy.sum()), int(middle.sum()))
    return PaperTable(settings.delta_1, settings.delta_2, *counts, rows)


def groups(probe: ProbeGram, delta_1: float, delta_2: float) -> tuple[Tensor, Tensor, Tensor]:
    """[m] bool each: hard, easy and neither."""
    rate = probe.num_correct.double() / probe.num_samples
    hard, easy = rate <= delta_1, rate >= delta_2
    return hard, easy, ~hard & ~easy


def paper_kernel(probe: ProbeGram, k: int) -> Tensor:
    """[m, m] plug-in w_k(x) kappa(x, x'): the terms of the paper's sum."""
    share = 1.0 / probe.num_samples.double()
    weight = passk_weight(probe.num_correct.double() * share, k)
    nothing = torch.zeros_like(share)
    return kernel_of(probe, (weight * share, nothing), (share, nothing))


def mean_over_pairs(terms: Tensor, left: Tensor) -> tuple[float, float]:
    """(1/m^2) times the sum of the rows of `terms` [m, m] that `left` [m] picks, and its jackknife standard error."""
    m = terms.shape[0]
    picked = terms * left.double()[:, None]
    total = picked.sum()
    without = (total - picked.sum(1) - picked.sum(0) + picked.diagonal()) / (m - 1) ** 2
    return float(total) / m**2, jackknife_error(without)


def _rows(name: str, probe: ProbeGram, settings: Settings) -> list[PaperRow]:
    m = probe.num_samples.numel()
    if m < 2:
        return []
    quantile = student_t_quantile((1 + settings.confidence) / 2, m - 1)
    everyone = torch.ones(m, dtype=torch.bool)
    masks = (everyone, *groups(probe, settings.delta_1, settings.delta_2))
    rows = []
    for k, estimate in estimate_each(probe, settings).items():
        terms = paper_kernel(probe, k)
        paper, hard, easy, middle = (with_error(*mean_over_pairs(terms, mask), quantile) for mask in masks)
        rows.append(
            PaperRow(
                parameters=name,
                k=k,
                paper=paper,
                hard=hard,
                easy=easy,
                middle=middle,
                ours=inner_product_of(estimate),
                cosine=cosine_of(estimate),
                status=estimate.status,
                reason=estimate.reason,
            )
        )
    return rows
