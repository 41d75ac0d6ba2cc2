"""The sections of the analysis page that look at single prompts: kernel, agreement, the worst of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from passk_guard.pages import analysis_words as words
from passk_guard.pages.analysis_words import Data
from passk_guard.pages.blocks import callout, figures, paragraph
from passk_guard.pages.charts import Points, scatter
from passk_guard.pages.document import Section
from passk_guard.pages.frame import Level, Upright
from passk_guard.pages.heat_map import heat_map
from passk_guard.pages.histogram import Distribution, histogram
from passk_guard.pages.html import join
from passk_guard.pages.table import Column, table

_SHOWN = 50


def kernel_section(data: Data) -> Section:
    """The heat map of the similarity kernel."""
    kernel = data["kernel"]
    note = (
        "Does getting better at one prompt help (blue) or hurt (vermillion) another? Prompts that are solved "
        "sometimes, from easy to hard, as in Fig. 2 of arXiv 2602.21189. The diagonal is left out."
    )
    if len(kernel["places"]) < 2:
        return Section("Prompt kernel", callout("Undetermined: fewer than two prompts are solved sometimes."), note)
    negative = words.with_interval(kernel["negative_pairs"])
    picture = heat_map(
        _matrix(kernel["below"]),
        title="Similarity kernel ⟨∇p(x), ∇p(x′)⟩",
        alt=f"Heat map of {len(kernel['places'])} prompts by the same from easy to hard. Negative pairs: {negative}.",
        x_label="prompt, easy to hard",
        y_label="prompt, easy to hard",
        boundaries=_boundaries(data),
        caption="" if data["paper"] is None else "Dashed: easy prompts end and hard ones begin (the paper's protocol).",
    )
    share = paragraph(f"Share of negative pairs: {negative} (noise alone gives 0.5).")
    return Section("Prompt kernel", join([picture, share]), note)


def _matrix(below: list[list[float]]) -> Tensor:
    size = len(below)
    matrix = torch.full((size, size), math.nan, dtype=torch.float64)
    for i, row in enumerate(below):
        matrix[i, :i] = matrix[:i, i] = torch.tensor(row, dtype=torch.float64)
    return matrix


def _boundaries(data: Data) -> list[int]:
    """Where easy prompts end and hard ones begin, when the paper's thresholds say so."""
    if data["paper"] is None:
        return []
    by_place = {p["place"]: p["pass_rate"]["value"] for p in data["prompts"]}
    rates = [by_place[place] for place in data["kernel"]["places"]]
    return [
        sum(r >= data["paper"]["delta_2"] for r in rates),
        sum(r > data["paper"]["delta_1"] for r in rates),
    ]


def agreement_section(data: Data) -> Section:
    """Agreement before and after reweighting, and the weights."""
    known = [p for p in data["prompts"] if p["agreement"]["value"] is not None]
    k, heading = data["settings"]["ks"][-1], "Weights and agreement"
    note = (
        "The agreement a(x) of a prompt says whether its gradient points where pass@1 of the others rises. Pass@k "
        "multiplies it by w_k(x), large on hard prompts; where hard prompts disagree, the mean turns negative "
        "(Figs. 5 to 8 of arXiv 2602.21189)."
    )
    if not known:
        return Section(heading, callout("Undetermined: no prompt is solved sometimes."), note)
    weight = data["at_k"][-1]["mean_weight"]["value"]
    agreement = [p["agreement"]["value"] for p in known]
    weighted = [p["weighted_agreement"]["value"] / weight if weight else None for p in known]
    before, after = data["mean_agreement"], data["reweighted_agreement"]
    without = [0.0] * (len(data["prompts"]) - len(known))  # no gradient estimate but zero: they belong to the means
    spread = histogram(
        [
            Distribution("a(x)", [*agreement, *without]),
            Distribution(f"w_{k}(x) a(x) / E[w_{k}]", [*weighted, *without]),
        ],
        [Upright(0.0, "0: no effect on the others")],
        x_label="agreement with the other prompts",
        y_label="share of prompts",
        title="Agreement before and after reweighting",
        alt=f"Histograms of agreement before and after reweighting by pass@{k}.",
    )
    cloud = scatter(
        [Points("prompt", [p["pass_rate"]["value"] for p in known], agreement, _labels(known))],
        levels=[Level(0.0, "0: no effect on the others")],
        x_label="p-hat, share of right samples",
        y_label="agreement a(x)",
        x_range=(0.0, 1.0),
        title="Agreement of each prompt",
        alt=f"Agreement over p-hat, {sum(a < 0 for a in agreement)} of {len(known)} prompts below zero.",
    )
    weights = scatter(
        [Points("prompt", [p["pass_rate"]["value"] for p in known], [p["weight"]["value"] for p in known])],
        x_label="p-hat, share of right samples",
        y_label=f"weight w_{k}",
        x_range=(0.0, 1.0),
        title="Weight of each prompt",
        alt=f"Weight of pass@{k} over p-hat: large where the model is seldom right.",
    )
    means = paragraph(
        f"Means over all prompts, those never or always solved counted as 0: E[a] = {words.scientific(before)} before, "
        f"E[w_{k} a] / E[w_{k}] = {words.scientific(after)} after reweighting (± standard error)."
    )
    return Section(heading, join([figures(spread, cloud, weights), means]), note)


def _labels(prompts: list[Data]) -> list[str]:
    return [
        f"{words.one_line(p['text'], 60)}: p-hat {words.value(p['pass_rate'], 2)}, a {words.scientific(p['agreement'])}"
        for p in prompts
    ]


def worst_prompts_section(data: Data) -> Section:
    """The table of prompts that pull against the others, largest share first."""
    k, heading = data["settings"]["ks"][-1], "The most negatively interfering prompts"
    shown = words.most_negative(data, _SHOWN)
    if not shown:
        return Section(heading, paragraph("None: no prompt pulls against the others, as far as the probe can tell."))
    texts = {p["place"]: p["text"] for p in data["prompts"]}
    columns = [
        Column("prompt"),
        Column("share of the conflict", "number", 3),
        Column("± s.e."),
        Column("p-hat", "number", 2),
        Column("p interval"),
        Column(f"w_{k}", "number", 2),
        Column("w interval"),
        Column("agreement a ± s.e."),
        Column("hurts most (⟨g_k, g_1⟩)"),
    ]
    rows = [
        (
            p["text"],
            p["share"]["value"],
            words.interval(p["share"]).removeprefix("±\u00a0"),
            p["pass_rate"]["value"],
            words.interval(p["pass_rate"], 2),
            p["weight"]["value"],
            words.interval(p["weight"], 2),
            words.scientific(p["agreement"]),
            words.hurt(p, texts),
        )
        for p in shown
    ]
    total = sum((p["share"]["value"] or 0) > 0 for p in data["prompts"])
    note = (
        f"{len(shown)} of {total} prompts whose gradient, as pass@{k} weighs it, lowers pass@1 of the others. A share "
        "is of the sum over these prompts. Single pairs (last column) are a ranking and carry no interval; "
        "analysis.json has every prompt."
    )
    return Section(heading, table(columns, rows, caption="Prompts that pull against the others"), note)
