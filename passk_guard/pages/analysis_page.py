"""The page of one analysed checkpoint, from the mappings of `analysis.json`."""

from __future__ import annotations

from collections.abc import Callable

from passk_guard.pages import analysis_words as words
from passk_guard.pages.analysis_prompts import agreement_section, kernel_section, worst_prompts_section
from passk_guard.pages.analysis_words import Data
from passk_guard.pages.blocks import callout, facts, figures, paragraph
from passk_guard.pages.charts import Band, Series, line_chart
from passk_guard.pages.document import Section, render_page
from passk_guard.pages.frame import Level, Upright
from passk_guard.pages.html import Html, join
from passk_guard.pages.table import Column, table

PAGE_KIND = "analysis"


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
        _paper,
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
    said = ", ".join(f"pass@{k} {words.with_interval(r)}" for k, r in zip(ks, rates, strict=True))
    chart = line_chart(
        [Series("pass@k", ks, [r["value"] for r in rates])],
        [Band(ks, [r["low"] for r in rates], [r["high"] for r in rates], f"{words.level(data)} interval")],
        x_label="k",
        y_label="pass@k",
        x_log=True,
        x_ticks=ks,
        y_range=(0.0, 1.0),
        title="pass@k",
        alt=f"Pass rate over k: {said}.",
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


def _paper(data: Data) -> Section | None:
    paper = data["paper"]
    if paper is None:
        return None
    counts = facts(
        {
            f"hard, p-hat ≤ {paper['delta_1']:g}": paper["num_hard"],
            f"easy, p-hat ≥ {paper['delta_2']:g}": paper["num_easy"],
            "in between": paper["num_middle"],
        }
    )
    columns = [Column("gradients with respect to"), Column("k", "number"), Column("paper's sum (biased)")]
    columns += [Column("of it hard"), Column("of it easy"), Column("of it between"), Column("ours (unbiased)")]
    columns += [Column("cosine, ours"), Column("status")]
    groups = ("paper", "hard", "easy", "middle", "ours")
    rows = [
        (
            row["parameters"],
            row["k"],
            *(words.scientific(row[group]) for group in groups),
            words.with_interval(row["cosine"], 2),
            row["status"],
        )
        for row in paper["rows"]
    ]
    note = (
        "⟨∇J_k, ∇J_1⟩ as arXiv 2602.21189 sums it: over all pairs, a prompt with itself included, with plug-in weights "
        "k(1 − p-hat)^(k−1) and no baseline. Same-prompt pairs push it up, plug-in weights shrink it. Beside it the "
        "unbiased estimate on the same samples. ± is the standard error."
    )
    return Section("The paper's protocol", join([counts, table(columns, rows, caption="Inner products")]), note)


def _settings(data: Data) -> Section:
    rows = words.settings_rows(data)
    listed = table([Column("setting"), Column("value")], rows, caption="Settings and sketch")
    return Section("Settings and sketch", listed)
