"""The page of one analysed checkpoint, from the mappings of `analysis.json`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from passk_guard.analysis import words
from passk_guard.analysis.store import PAGE_KIND
from passk_guard.analysis.words import Data
from passk_guard.reporting.html.charts import Band, Points, Series, line_chart, scatter
from passk_guard.reporting.html.elements import Html, callout, facts, figures, join, paragraph
from passk_guard.reporting.html.frame import Level, Upright
from passk_guard.reporting.html.heat_map import heat_map
from passk_guard.reporting.html.histogram import Distribution, histogram
from passk_guard.reporting.html.page import Section, render_page
from passk_guard.reporting.html.table import Column, table

_SHOWN = 50  # rows of the table of prompts


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
    )
    share = paragraph(f"Share of negative pairs: {negative} (noise alone gives 0.5).")
    return Section("Prompt kernel", join([picture, share]), note)


def _matrix(below: list[list[float]]) -> Tensor:
    size = len(below)
    matrix = torch.full((size, size), math.nan, dtype=torch.float64)
    for i, row in enumerate(below):
        matrix[i, :i] = matrix[:i, i] = torch.tensor(row, dtype=torch.float64)
    return matrix


def agreement_section(data: Data) -> Section:
    """Agreement before and after reweighting, and the weights."""
    known = [p for p in data["prompts"] if p["agreement"]["value"] is not None]
    k, heading = data["settings"]["ks"][-1], "Weights and agreement"
    note = (
        "The agreement a(x) of a prompt shows whether its gradient points where pass@1 of the others rises. Pass@k "
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
        f"{words.excerpt(p['text'], 60)}: p-hat {words.value(p['pass_rate'], 2)}, a {words.scientific(p['agreement'])}"
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


def analysis_page(data: Data) -> str:
    """The whole page as text.

    Args:
        data: `Analysis.to_dict()`, or what `analysis.json` holds.
    """
    makers: tuple[Callable[[Data], Section | None], ...] = (
        _rates,
        _angle,
        kernel_section,
        agreement_section,
        worst_prompts_section,
        _mitigations,
        _settings,
    )
    sections = [section for make in makers if (section := make(data)) is not None]
    return render_page(f"passk_guard: {data['model']['name']}", sections, kind=PAGE_KIND, lead=_lead(data))


def _lead(data: Data) -> Html:
    sentence, kind = words.verdict(data)
    known = len(data["prompts"]) - data["never_solved"] - data["always_solved"]
    counts = {
        "prompts": data["num_prompts"],
        "samples of each": data["settings"]["num_samples"],
        "solved sometimes": known,
        "never solved": data["never_solved"],
        "always solved": data["always_solved"],
        "correct means": data["verifier"],
    }
    if data["left_out"]:
        counts["left out, too few verdicts"] = data["left_out"]
    remark = paragraph(f"Of the samples: {data['remark']}.") if data["remark"] else Html()
    return join([callout(sentence, kind), facts(counts), remark])  # type: ignore[arg-type]


def _rates(data: Data) -> Section:
    ks = [at["k"] for at in data["at_k"]]
    rates = [at["pass_rate"] for at in data["at_k"]]
    text = ", ".join(f"pass@{k} {words.with_interval(r)}" for k, r in zip(ks, rates, strict=True))
    chart = line_chart(
        [Series("pass@k", ks, [r["value"] for r in rates])],
        [Band(ks, [r["low"] for r in rates], [r["high"] for r in rates], f"{words.level(data)} interval")],
        x_label="k",
        y_label="pass@k",
        x_log=True,
        x_ticks=ks,
        y_range=(0.0, 1.0),
        title="pass@k",
        alt=f"Pass rate over k: {text}.",
    )
    columns = [Column("k", "number"), Column("pass@k", "number", 3), Column("interval"), Column("mean weight E[w_k]")]
    rows = [(at["k"], at["pass_rate"]["value"], words.interval(at["pass_rate"]), _weight(at)) for at in data["at_k"]]
    note = (
        "Unbiased estimates over prompts like these. The weight is what pass@k multiplies a prompt's gradient with, "
        "w_k(p) = k (1 − p)^(k−1)."
    )
    listed = table(columns, rows, caption="pass@k and mean weight")
    return Section("How often the model is right", figures(chart, listed), note)


def _weight(at: Data) -> str:
    return "1" if at["k"] == 1 else words.with_interval(at["mean_weight"])


def _angle(data: Data) -> Section:
    note = (
        "The angle between the gradients of pass@k and of pass@1. Below zero a step that raises pass@k lowers pass@1. "
        "Estimated over pairs of different prompts, with the jackknife over prompts. Intervals are two-sided; the "
        f"status is decided by the one-sided {words.level(data)} bound, which lies further in."
    )
    columns = [Column("k", "number"), Column("cosine", "number", 2), Column("interval"), Column("status")]
    columns += [Column("inner product ± s.e."), Column("why")]
    rows = [
        (
            at["k"],
            at["cosine"]["value"],
            words.interval(at["cosine"], 2),
            at["status"],
            words.scientific(at["inner_product"]),
            at["reason"],
        )
        for at in data["at_k"]
        if at["status"] is not None
    ]
    listed = table(columns, rows, caption="cos(∇J_k, ∇J_1)") if rows else paragraph("Only k = 1 was asked for.")
    return Section("Does pass@k cost pass@1?", join([_curve(data), listed]), note)


def _curve(data: Data) -> Html:
    curve = data["curve"]
    if curve is None:
        return callout(f"Undetermined: {data['at_k'][-1]['reason']}.")
    threshold = data["settings"]["threshold"]
    found = any(curve["established"])
    marker = [Upright(curve["k_star"], f"k* = {curve['k_star']}")] if found else []
    chart = line_chart(
        [Series("cos(∇J_k, ∇J_1)", curve["k"], curve["cosine"])],
        [Band(curve["k"], curve["low"], curve["high"], f"{words.level(data)} band, k by k")],
        marker,
        x_label="k",
        y_label="cosine",
        x_log=True,
        levels=[Level(threshold, f"threshold {threshold:g}")],
        y_range=(-1.0, 1.0),
        title="Angle over k",
        alt=f"Cosine over k. {words.k_star(data)} {words.verdict(data)[0]}",
    )
    return join([figures(chart), paragraph(words.k_star(data))])


def _mitigations(data: Data) -> Section | None:
    if not data["predictions"]:
        return None
    k = data["settings"]["ks"][-1]
    columns = [Column("mitigation"), Column("setting"), Column("cosine to expect"), Column(f"pass@{k} gain kept")]
    columns.append(Column("note"))
    rows = [
        (p["name"], p["setting"], words.with_interval(p["cosine"], 2), words.with_interval(p["kept"], 2), p["note"])
        for p in data["predictions"]
    ]
    note = (
        "Predicted from the same samples, to first order and for a gradient without a batch's own noise: the cosine of "
        "the mitigated gradient with ∇J_1, and how much of a step's gain in pass@k is left."
    )
    return Section("What the mitigations would do", table(columns, rows, caption="Predicted effect"), note)


def _settings(data: Data) -> Section:
    rows = words.settings_rows(data)
    listed = table([Column("setting"), Column("value")], rows, caption="Settings and sketch")
    return Section("Settings and sketch", listed)
