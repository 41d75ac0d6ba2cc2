"""From the Gram matrices to the record: no model is needed any more, and every rank comes to the same."""

from __future__ import annotations

from dataclasses import dataclass

from passk_guard.analysis.kernels import mixed
from passk_guard.analysis.measure import curve_of, estimate_each, inner_product_of, kernel_from, measure_at
from passk_guard.analysis.paper import paper_table
from passk_guard.analysis.predict import predictions
from passk_guard.analysis.prompts import prompt_records, prompt_text
from passk_guard.analysis.record import Analysis, AtK, Number, Sketch
from passk_guard.analysis.settings import Settings
from passk_guard.estimation.estimate import estimate_pooled
from passk_guard.estimation.noise import measure_noise
from passk_guard.estimation.records import ProbeGram
from passk_guard.probe.prompts import ProbeSet
from passk_guard.probe.refresh import Refresh


@dataclass(frozen=True)
class Measured:
    """What the model was needed for.

    Attributes:
        refreshes: set of parameters -> counts and Gram matrix; the first is the one the analysis is about.
        sketch: how the first was made.
    """

    refreshes: dict[str, Refresh]
    sketch: Sketch


def conclude(
    measured: Measured, prompts: ProbeSet, verifier: str, model: dict[str, str], settings: Settings
) -> Analysis:
    """All numbers of the record.

    Args:
        measured: from the samples.
        prompts: all m of them, in the order of their places.
        verifier: name of the function that means correct.
        model: its name and fingerprint.
        settings: of the analysis.
    """
    refresh = next(iter(measured.refreshes.values()))
    probe, names = refresh.probe, [int(key) for key in refresh.probe.prompt_keys]
    estimates = estimate_each(probe, settings)
    at_k = [measure_at(probe, k, estimates.get(k), settings.confidence) for k in settings.ks]
    texts = [prompt_text(prompts[i]) for i in names]
    constant = ~mixed(probe)
    noise = measure_noise(probe, settings.k)
    grams = {what: one.probe for what, one in measured.refreshes.items()}
    return Analysis(
        model=model,
        settings=settings.to_dict(),
        verifier=verifier,
        num_prompts=len(prompts),
        left_out=len(prompts) - len(names),
        never_solved=int((constant & (probe.num_correct == 0)).sum()),
        always_solved=int((constant & (probe.num_correct > 0)).sum()),
        remark=refresh.remark,
        at_k=at_k,
        curve=curve_of(estimates),
        mean_agreement=mean_agreement(probe, settings.confidence),
        reweighted_agreement=reweighted_agreement(at_k[-1]),
        prompts=prompt_records(probe, settings.k, names, texts, settings.confidence),
        kernel=kernel_from(probe, names),
        predictions=predictions(probe, estimates, settings),
        paper=paper_table(grams, settings) if settings.protocol == "paper" else None,
        sketch=measured.sketch,
        noise=None if noise is None else noise.to_dict(),
    )


def mean_agreement(probe: ProbeGram, confidence: float) -> Number:
    """E[a] = |grad J_1|^2: the inner product at k = 1."""
    return inner_product_of(estimate_pooled([probe], 1, confidence=confidence))


def reweighted_agreement(at: AtK) -> Number:
    """E[w_k a] / E[w_k], its standard error and interval those of E[w_k a] alone over the estimated E[w_k]."""
    weight = at.mean_weight.value
    if not weight or at.inner_product.value is None:
        return Number()
    parts = (at.inner_product.value, at.inner_product.standard_error, at.inner_product.low, at.inner_product.high)
    return Number(*(None if part is None else part / weight for part in parts))
