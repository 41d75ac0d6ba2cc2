"""Which prompts pull against the rest: kernel, agreement scores, and how the weights fall on them. torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from passk_guard.estimation.records import ProbeGram
from passk_guard.estimation.ustatistics import (
    PassKRows,
    Rows,
    cluster_sizes,
    clusters,
    other_prompt_sums,
    passk_rows,
    prompt_kernel,
)
from passk_guard.passk.closed_forms import unbiased_passk_weight
from passk_guard.utils.clusters import cluster_sums

_PASS_AT_1 = passk_rows(torch.tensor([1]))


def informative(probe: ProbeGram) -> Tensor:
    """[m] bool: prompts with both right and wrong samples; the gradient estimate of the others is zero."""
    return (probe.num_correct > 0) & (probe.num_correct < probe.num_samples)


def informative_clusters(probe: ProbeGram) -> int:
    """Number of clusters with such a prompt; the prompts themselves where each is a cluster of its own."""
    return len(clusters(probe)[informative(probe)].unique())


def agreement_sums(probe: ProbeGram, rows: Rows = _PASS_AT_1) -> Tensor:
    """[m] sum over x' of other clusters of <g(x), g_1(x')>, with the g of the one row; for pass@k computed once."""

    def sums() -> Tensor:
        return other_prompt_sums(probe, rows(probe)[0], _PASS_AT_1(probe)[0])

    return probe.keep(("agreement", rows), sums) if isinstance(rows, PassKRows) else sums()


def prompt_view(probe: ProbeGram, rows: Rows) -> dict[str, Any]:
    r"""One refresh, prompt by prompt: the per-prompt fields of `ConflictEstimate`.

    $a(x) = \frac{1}{m-1} \sum_{x' \ne x} \langle g_1(x), g_1(x') \rangle$ estimates the agreement score of
    arXiv 2602.21189, Sec. 4. The same sum with the g(x) of `rows` on the left is the share of prompt x in the conflict:
    its mean over prompts is the inner product. Negative pairs are counted among prompts with a gradient. Prompts of one
    cluster are no pair.
    """
    cluster, others = clusters(probe), probe.num_samples.numel() - cluster_sizes(probe)[clusters(probe)]
    one = _PASS_AT_1(probe)[0]
    kernel, mixed = prompt_kernel(probe, one, one), informative(probe)
    pairs = mixed[:, None] & mixed[None, :] & (cluster[:, None] != cluster)
    return {
        "kernel": kernel,
        "agreement": agreement_sums(probe) / others,
        "weighted_agreement": agreement_sums(probe, rows) / others,
        "frac_negative_pairs": int(((kernel < 0) & pairs).sum()) / int(pairs.sum()) if bool(pairs.any()) else None,
    }


def weight_and_agreement(probes: Sequence[ProbeGram], k: int) -> dict[str, Any]:
    """E[w_k] and cov(w_k, a), pooled over the refreshes with fresh samples; empty where the newest has none.

    E[w_k] is a mean over all prompts, and importance ratios are known only for prompts with a gradient.
    cov = E[w a] - E[w] E[a]. The product is averaged over triples of different clusters, so it is unbiased too.
    """
    if probes[-1].reused:
        return {}
    probes = [p for p in probes if not p.reused]
    total = sum(p.num_samples.numel() for p in probes)
    mean_weight = covariance = 0.0
    for probe in probes:
        m = probe.num_samples.numel()
        weight = unbiased_passk_weight(probe.num_samples, probe.num_correct, k)
        agreement = agreement_sums(probe)
        size = cluster_sizes(probe).double()
        pairs, twice = m * m - float(size.square().sum()), float((size.square() * (m - size)).sum())
        apart = cluster_sums(weight, clusters(probe)) @ cluster_sums(agreement, clusters(probe))
        triples = float(weight.sum() * agreement.sum() - 2 * apart) / (m * pairs - 2 * twice)
        inner = float(agreement_sums(probe, passk_rows(torch.tensor([k]))).sum()) / pairs
        mean_weight += m / total * float(weight.mean())
        covariance += m / total * (inner - triples)
    return {"mean_weight": mean_weight, "weight_agreement_cov": covariance}
