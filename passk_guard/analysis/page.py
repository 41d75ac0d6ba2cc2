"""The pages of one analysed checkpoint and of two that are compared: figures for their templates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from passk_guard.analysis import words
from passk_guard.analysis.store import PAGE_KIND
from passk_guard.analysis.words import Data
from passk_guard.reporting.html import figures as fig
from passk_guard.reporting.html.page import data_link, render_page
from passk_guard.reporting.html.text import label, told_apart, write_number

if TYPE_CHECKING:
    from passk_guard.analysis.comparison import Comparison
    from passk_guard.analysis.rollout_results import RolloutAnalysis

COMPARISON_KIND, ROLLOUTS_KIND = "comparison", "rollouts"
_SHOWN = 50
_MOVERS = 10


def analysis_page(data: Data) -> str:
    """The whole page as text.

    Args:
        data: `Analysis.to_dict()`, or what `analysis.json` holds.
    """
    known = [p for p in data["prompts"] if p["agreement"]["value"] is not None]
    texts = words.short_texts(data)
    return render_page(
        "analysis.html.j2",
        f"passk_guard: {data['model']['name']}",
        kind=PAGE_KIND,
        data=data,
        words=words,
        k=data["settings"]["ks"][-1],
        rates=_rates(data),
        curve=_curve(data) if data["curve"] is not None else None,
        kernel=_kernel(data, texts) if len(data["kernel"]["places"]) > 1 else None,
        agreement=_agreements(known, texts) if known else None,
        worst=words.most_negative(data, _SHOWN),
        least=sorted(known, key=lambda p: p["agreement"]["value"])[:_SHOWN],
        texts=texts,
        download=data_link({name: value for name, value in data.items() if name != "kernel"}),  # grows with m squared
    )


def comparison_page(found: Comparison) -> str:
    """The whole page as text."""
    prompts = told_apart([text for text, _, _ in (*found.lost, *found.gained)])
    return render_page(
        "comparison.html.j2",
        "passk_guard: A and B compared",
        kind=COMPARISON_KIND,
        found=found,
        figures_of=_compared(found),
        rows=list(zip(found.lost + found.gained, prompts, strict=True)),
        download=data_link(found.to_dict()),
    )


def rollouts_page(found: RolloutAnalysis) -> str:
    """The whole page as text."""
    data = found.to_dict()
    texts = told_apart([prompt["text"] for prompt in data["prompts"]])
    rows = list(zip(data["prompts"], texts, strict=True))
    by_share = sorted(rows, key=lambda row: -row[0]["share_k"])
    changes = found.effective_samples is not None
    moved = sorted((row for row in rows if row[0]["change"]), key=lambda row: row[0]["change"])
    return render_page(
        "rollouts.html.j2",
        f"passk_guard: {found.name}",
        kind=ROLLOUTS_KIND,
        found=found,
        data=data,
        words=words,
        changes=_changes(data) if changes else None,
        rates=_rates(data),
        histogram=_histogram(data, found.k),
        trained_on=[row for row in by_share[:_SHOWN] if row[0]["share_k"] > 0],
        lost=[row for row in moved[:_MOVERS] if row[0]["change"] < 0],
        gained=[row for row in moved[: -_MOVERS - 1 : -1] if row[0]["change"] > 0],
        download=data_link(data),
    )


def _changes(data: Data) -> fig.Figure:
    ks, changes = [at["k"] for at in data["at_k"]], [at["change"] for at in data["at_k"]]
    low, high = [c["low"] for c in changes], [c["high"] for c in changes]
    traces = [
        fig.band(ks, low, high, fig.BLUE, showlegend=True, name=f"{words.level(data)} interval of each k"),
        fig.curve("change", ks, [c["value"] for c in changes], fig.BLUE, showlegend=False),
    ]
    told = ", ".join(f"pass@{k} {words.with_interval(c)}" for k, c in zip(ks, changes, strict=True))
    return fig.Figure("Change of pass@k", f"Change over k: {told}.", traces, fig.over_k(ks, "change of pass@k"))


def _histogram(data: Data, k: int) -> fig.Figure:
    parts, count = data["solve_rates"], data["num_prompts"]
    shares: dict[str, list[float | None]] = {"prompts": [part["num_prompts"] / count for part in parts]}
    shares |= {
        f"advantages of pass@{j}": [part[f"share_{name}"]["value"] for part in parts] for j, name in ((1, 1), (k, "k"))
    }
    names = [part["name"] for part in parts]
    bars = [
        {"type": "bar", "name": name, "x": names, "y": fig.known(values), "marker": {"color": colour}}
        | {"yhoverformat": ".0%"}
        for (name, values), colour in zip(shares.items(), (fig.GREY, fig.BLUE, fig.VERMILLION), strict=True)
    ]
    layout = fig.plain("solve rate", "share") | {"hovermode": "x unified", "barmode": "group"}
    layout["xaxis"] |= {"type": "category"}
    layout["yaxis"] |= {"tickformat": ".0%"}
    told = "; ".join(f"{part['name']}: {part['num_prompts']} prompts" for part in parts)
    return fig.Figure("Solve rates, and whom the advantages go to", f"Prompts by solve rate. {told}.", bars, layout)


def _compared(found: Comparison) -> list[fig.Figure]:
    ks = list(found.ks)
    rates = [
        fig.curve("A", ks, found.pass_a, fig.BLUE, meta={"run": 0}),
        fig.curve("B", ks, found.pass_b, fig.VERMILLION, "dash", meta={"run": 1}),
    ]
    told = "; ".join(f"k = {k}: {write_number(d, 0.001)}" for k, d in zip(ks, found.difference, strict=True))
    level = f"{100 * found.confidence:g}%"
    wide = [
        fig.band(ks, found.low, found.high, fig.BLUE, showlegend=True, name=f"{level} band, all k together"),
        fig.curve("B − A", ks, found.difference, fig.BLUE, showlegend=False),
    ]
    return [
        fig.Figure("pass@k of A and of B", f"pass@k of both over k. {found.verdict}", rates, fig.over_k(ks, "pass@k")),
        fig.Figure("Difference B − A", told, wide, fig.over_k(ks, "difference of pass@k")),
    ]


def _rates(data: Data) -> fig.Figure:
    ks, rates = [at["k"] for at in data["at_k"]], [at["pass_rate"] for at in data["at_k"]]
    values = ", ".join(f"pass@{k} {words.with_interval(r)}" for k, r in zip(ks, rates, strict=True))
    low, high = [r["low"] for r in rates], [r["high"] for r in rates]
    traces = [
        fig.band(ks, low, high, fig.BLUE, showlegend=True, name=f"{words.level(data)} interval of each k"),
        fig.curve("pass@k", ks, [r["value"] for r in rates], fig.BLUE, showlegend=False),
    ]
    return fig.Figure("pass@k", f"Pass rate over k: {values}.", traces, fig.over_k(ks, "pass@k"))


def _curve(data: Data) -> fig.Figure:
    found, level = data["curve"], words.level(data)
    bands = [(found["low"], found["high"], f"{level} interval of each k")]
    if found["band_low"] is not None:
        bands.insert(0, (found["band_low"], found["band_high"], f"{level} band, all k together (wider)"))
    established = any(found["established"])
    return fig.angle_over_k(
        found["k"],
        found["cosine"],
        bands,
        title="Angle over k",
        alt=f"Cosine over k. {words.k_star(data)} {words.verdict(data)[0]}",
        note="Vermillion points: a conflict is established there." if established else "",
        threshold=data["settings"]["threshold"],
        k_star=found["k_star"] if established else None,
        established=found["established"],
    )


def _kernel(data: Data, texts: dict[int, str]) -> fig.Figure:
    places = data["kernel"]["places"]
    negative = words.with_interval(data["kernel"]["negative_pairs"])
    return fig.heat_map(
        _matrix(data["kernel"]["below"]),
        [texts[place] for place in places],
        title="Similarity kernel ⟨∇p(x), ∇p(x′)⟩",
        alt=f"Heat map of {len(places)} prompts by the same from easy to hard. Negative pairs: {negative}.",
        side="prompt, easy to hard",
        note="Point at a cell to read its two prompts.",
    )


def _matrix(below: list[list[float]]) -> Tensor:
    size = len(below)
    matrix = torch.full((size, size), math.nan, dtype=torch.float64)
    for i, row in enumerate(below):
        matrix[i, :i] = matrix[:i, i] = torch.tensor(row, dtype=torch.float64)
    return matrix


def _agreements(known: list[Data], texts: dict[int, str]) -> fig.Figure:
    agreement = [p["agreement"]["value"] for p in known]
    names = [f"{label(texts[p['place']], 60)}: a {words.scientific(p['agreement'])}" for p in known]
    points: dict[str, Any] = {"type": "scatter", "mode": "markers", "y": agreement, "text": names}
    points |= {"x": [p["pass_rate"]["value"] for p in known], "marker": {"color": fig.BLUE, "size": 7, "opacity": 0.6}}
    points |= {"hovertemplate": "%{text}<br>p-hat %{x:.2f}<extra></extra>"}
    alt = f"Agreement over p-hat, {sum(a < 0 for a in agreement)} of {len(known)} prompts below zero."
    return fig.Figure(
        "Agreement of each prompt", alt, [points], fig.plain("p-hat, share of correct samples", "agreement a(x)")
    )
