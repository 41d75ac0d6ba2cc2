"""The page of one analysed checkpoint, from the mappings of `analysis.json`: charts for its template."""

from __future__ import annotations

import math

import torch
from markupsafe import Markup
from torch import Tensor

from passk_guard.analysis import words
from passk_guard.analysis.store import PAGE_KIND
from passk_guard.analysis.words import Data
from passk_guard.reporting.html.charts import Band, Distribution, Points, Series, histogram, line_chart, scatter
from passk_guard.reporting.html.frame import Level, Upright
from passk_guard.reporting.html.heat_map import heat_map
from passk_guard.reporting.html.page import render_page

_SHOWN = 50
_NEUTRAL = "0: no effect on the others"


def analysis_page(data: Data) -> str:
    """The whole page as text.

    Args:
        data: `Analysis.to_dict()`, or what `analysis.json` holds.
    """
    known = [p for p in data["prompts"] if p["agreement"]["value"] is not None]
    return render_page(
        "analysis.html.j2",
        f"passk_guard: {data['model']['name']}",
        kind=PAGE_KIND,
        data=data,
        words=words,
        k=data["settings"]["ks"][-1],
        rates=_rates(data),
        curve=_curve(data) if data["curve"] is not None else None,
        kernel=_kernel(data) if len(data["kernel"]["places"]) > 1 else None,
        agreement=[_spread(data, known), _agreements(known), _weights(data, known)] if known else [],
        worst=words.most_negative(data, _SHOWN),
        texts={p["place"]: p["text"] for p in data["prompts"]},
    )


def _rates(data: Data) -> Markup:
    ks, rates = [at["k"] for at in data["at_k"]], [at["pass_rate"] for at in data["at_k"]]
    values = ", ".join(f"pass@{k} {words.with_interval(r)}" for k, r in zip(ks, rates, strict=True))
    return line_chart(
        [Series("pass@k", ks, [r["value"] for r in rates])],
        [Band(ks, [r["low"] for r in rates], [r["high"] for r in rates], f"{words.level(data)} interval")],
        x_label="k",
        y_label="pass@k",
        x_log=True,
        x_ticks=ks,
        y_range=(0.0, 1.0),
        title="pass@k",
        alt=f"Pass rate over k: {values}.",
    )


def _curve(data: Data) -> Markup:
    curve, threshold = data["curve"], data["settings"]["threshold"]
    found, level = any(curve["established"]), words.level(data)
    bands = [Band(curve["k"], curve["low"], curve["high"], f"{level} interval of each k")]
    if curve["band_low"] is not None:
        bands = [
            Band(curve["k"], curve["band_low"], curve["band_high"], f"{level} band, all k together (wider)"),
            *bands,
        ]
    return line_chart(
        [Series("cos(∇J_k, ∇J_1)", curve["k"], curve["cosine"])],
        bands,
        [Upright(curve["k_star"], f"k* = {curve['k_star']}")] if found else [],
        x_label="k",
        y_label="cosine",
        x_log=True,
        levels=[Level(threshold, f"threshold {threshold:g}")],
        y_range=(-1.0, 1.0),
        title="Angle over k",
        alt=f"Cosine over k. {words.k_star(data)} {words.verdict(data)[0]}",
    )


def _kernel(data: Data) -> Markup:
    places = data["kernel"]["places"]
    negative = words.with_interval(data["kernel"]["negative_pairs"])
    return heat_map(
        _matrix(data["kernel"]["below"]),
        title="Similarity kernel ⟨∇p(x), ∇p(x′)⟩",
        alt=f"Heat map of {len(places)} prompts by the same from easy to hard. Negative pairs: {negative}.",
        label="prompt, easy to hard",
    )


def _matrix(below: list[list[float]]) -> Tensor:
    size = len(below)
    matrix = torch.full((size, size), math.nan, dtype=torch.float64)
    for i, row in enumerate(below):
        matrix[i, :i] = matrix[:i, i] = torch.tensor(row, dtype=torch.float64)
    return matrix


def _spread(data: Data, known: list[Data]) -> Markup:
    k, weight = data["settings"]["ks"][-1], data["at_k"][-1]["mean_weight"]["value"]
    weighted = [p["weighted_agreement"]["value"] / weight if weight else None for p in known]
    without = [0.0] * (len(data["prompts"]) - len(known))  # no gradient estimate but zero: they belong to the means
    return histogram(
        [
            Distribution("a(x)", [*(p["agreement"]["value"] for p in known), *without]),
            Distribution(f"w_{k}(x) a(x) / E[w_{k}]", [*weighted, *without]),
        ],
        [Upright(0.0, _NEUTRAL)],
        x_label="agreement with the other prompts",
        y_label="share of prompts",
        title="Agreement before and after reweighting",
        alt=f"Histograms of agreement before and after reweighting by pass@{k}.",
    )


def _agreements(known: list[Data]) -> Markup:
    agreement = [p["agreement"]["value"] for p in known]
    labels = [
        f"{words.excerpt(p['text'], 60)}: p-hat {words.value(p['pass_rate'], 2)}, a {words.scientific(p['agreement'])}"
        for p in known
    ]
    return scatter(
        [Points("prompt", [p["pass_rate"]["value"] for p in known], agreement, labels)],
        levels=[Level(0.0, _NEUTRAL)],
        x_label="p-hat, share of right samples",
        y_label="agreement a(x)",
        x_range=(0.0, 1.0),
        title="Agreement of each prompt",
        alt=f"Agreement over p-hat, {sum(a < 0 for a in agreement)} of {len(known)} prompts below zero.",
    )


def _weights(data: Data, known: list[Data]) -> Markup:
    k = data["settings"]["ks"][-1]
    return scatter(
        [Points("prompt", [p["pass_rate"]["value"] for p in known], [p["weight"]["value"] for p in known])],
        x_label="p-hat, share of right samples",
        y_label=f"weight w_{k}",
        x_range=(0.0, 1.0),
        title="Weight of each prompt",
        alt=f"Weight of pass@{k} over p-hat: large where the model is seldom right.",
    )
