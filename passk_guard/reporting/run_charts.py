"""The figures of runs over each other: colour and dashes tell the run, one crosshair reads all panels at a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from passk_guard.change import missed_in_words
from passk_guard.reporting.html import figures as fig
from passk_guard.reporting.html.text import label, write_number
from passk_guard.reporting.run import FAILED, Run, quantile, state_of

# (colour, height in its lane, opacity): states differ in more than colour.
_STATES = {
    "losing": (fig.VERMILLION, 0.9, 0.75),
    "conflict": (fig.VERMILLION, 0.9, 0.75),
    "undetermined": (fig.GREY, 0.3, 0.35),
    "clear": (fig.GREEN, 0.55, 0.6),
    "holding": (fig.GREEN, 0.55, 0.6),
    "gaining": (fig.GREEN, 0.75, 0.75),
    FAILED: (fig.OCHRE, 0.12, 0.9),
}
_STRENGTH = (
    ("floor", "Floor under the prompt weights", ("refresh", "steps")),
    ("hold_multiplier", "lambda of hold", ("refresh", "steps")),
)
_FURTHER = (
    ("train_cosine", "Cosine of the training gradient and the protected direction, before", ("steps",)),
    ("mitigated", "Share of steps that were changed", ("steps",)),
    ("coefficient", "Coefficient of the protected direction", ("steps",)),
    ("protected_reliability", "Share of the protected direction that is no noise", ("refresh",)),
    ("hold_above_level", "What hold keeps, less its level", ("refresh",)),
    ("k_star", "k*: largest k without an established conflict", ("refresh",)),
    ("agreement", "Mean agreement under the pass@k weights", ("refresh",)),
    ("frac_negative_pairs", "Share of negative prompt pairs", ("refresh",)),
    ("effective_samples", "Effective share of the samples of the realised change", ("change",)),
)


class _Drawn:
    """Traces of all runs: each in the run's colour, dashes and symbol, and with its number for the toggles."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs

    def named(self, what: str, run: Run) -> str:
        return what if len(self.runs) == 1 else f"{what}, {run.name}"

    def line(self, i: int, what: str, x: fig.Column, y: fig.Column, **more: Any) -> fig.Trace:
        dash = more.pop("dash", fig.DASHES[i % 4])
        colour = more.pop("colour", fig.COLOURS[i % 6])
        return fig.curve(self.named(what, self.runs[i]), x, y, colour, dash, meta={"run": i}, **more)

    def dots(self, i: int, what: str, x: fig.Column, y: fig.Column, error: fig.Column) -> fig.Trace:
        name = self.named(what, self.runs[i])
        return fig.dots(name, x, y, error, fig.COLOURS[i % 6], fig.SYMBOLS[i % 4], meta={"run": i})

    def band(self, i: int, x: fig.Column, low: fig.Column, high: fig.Column) -> fig.Trace:
        return fig.band(x, low, high, fig.COLOURS[i % 6], meta={"run": i})


def main_figure(runs: Sequence[Run]) -> fig.Figure:
    """Verdicts, pass rates, changes, cosine and evidence over the steps of training."""
    drawn = _Drawn(runs)
    ks = sorted({1, *(k for run in runs for k in run.ks)})
    measured = [k for k in ks if any(_any(run.column(f"pass_at_{k}_total", "change")) for run in runs)]
    panels = [
        _verdicts(drawn),
        *(_rate(drawn, k) for k in ks),
        *(_change(drawn, k) for k in measured),
        _cosine(drawn),
        *_evidence(drawn),
        *_singles(drawn, _STRENGTH),
    ]
    lines = [f"{run.name}: {run.headline[0]}" if len(runs) > 1 else run.headline[0] for run in runs]
    note = (
        "Open marks: one measurement ± 1 standard error. Line and band: all measurements fused, or the total of the "
        "windows, with its interval. Verdicts: a full bar is LOSING or CONFLICT, half a bar CLEAR, HOLDING or GAINING, "
        "a thin one undetermined. Hatched: the cosine is not determined. Point at a step, or use the arrow keys."
    )
    return fig.stacked(
        panels,
        title="Over training",
        alt=" ".join(lines) + " " + "; ".join(_extents(runs, ks)) + ".",
        x_title="step",
        note=note,
        shapes=_tints(runs[0]) if len(runs) == 1 else (),
    )


def who_pays(runs: Sequence[Run]) -> fig.Figure | None:
    """The change of pass@1 since the start, by solve rate and by group; None without windows."""
    shown = [(i, run, run.by_group) for i, run in enumerate(runs) if run.windows]
    if not shown:
        return None
    drawn, panels, alts = _Drawn(runs), [], []
    for i, run, groups in shown:
        at_end = {"mode": "lines+markers+text", "textposition": "middle right"}
        lines = []
        for j, (name, totals) in enumerate(groups.items()):
            named = {"text": [""] * (len(totals) - 1) + [f" {label(name, 24)}"], "hovertemplate": "%{y:.3f}"}
            more = at_end | named | {"colour": fig.COLOURS[j % 6], "dash": fig.DASHES[j % 4]}
            lines.append(drawn.line(i, name, run.ends, totals, **more))
        panels.append(fig.Panel(drawn.named("Change of pass@1 since the start", run), lines, height=200))
        last = ", ".join(f"{name} {write_number(totals[-1], 0.001)}" for name, totals in groups.items())
        alts.append(drawn.named(f"At the end: {last}", run))
    room = {"range": _range([step for _, run, _ in shown for step in (0, run.windows[-1]["step"])], 0.26)}
    note = "Hard, medium and easy by the solve rate of other samples; the three add up to the change of pass@1."
    return fig.stacked(panels, title="Who pays", alt="; ".join(alts) + ".", x_title="step", note=note, **room)


def further_figure(runs: Sequence[Run]) -> fig.Figure | None:
    """What projection did, k*, agreement and the effective samples; None where no run has any."""
    drawn = _Drawn(runs)
    panels = _singles(drawn, _FURTHER)
    alt = "; ".join(panel.title for panel in panels) + ", over the steps of training."
    return fig.stacked(panels, title="Further numbers", alt=alt, x_title="step") if panels else None


def _singles(drawn: _Drawn, rows: Iterable[tuple[str, str, tuple[str, ...]]]) -> list[fig.Panel]:
    panels = []
    for name, what, kinds in rows:
        found = [(i, *run.columns(name, *kinds)) for i, run in enumerate(drawn.runs)]
        lines = [drawn.line(i, name, steps, values) for i, steps, values in found if _any(values)]
        panels += [fig.Panel(what, lines, height=100)] if lines else []
    return panels


def _verdicts(drawn: _Drawn) -> fig.Panel:
    traces: list[fig.Trace] = []
    lanes: list[str] = []
    ticks: list[str] = []
    for i, run in enumerate(drawn.runs):
        for what, spans in (("angle", run.spans), ("change", run.outcomes)):
            if not spans:
                continue
            y = -len(lanes)
            lanes.append(drawn.named(what, run))
            short = label(run.name.rsplit("/")[-1], 9)
            ticks.append(what if len(drawn.runs) == 1 or what == "change" else short)
            for state, (colour, height, opacity) in _STATES.items():
                if here := [(start, end) for start, end, found in spans if found == state]:
                    traces.append(fig.area(*fig.boxes(here, y, y + height), colour, opacity, meta={"run": i}))
            if what == "angle":
                at = [(event["step"], state_of(event).upper()) for event in run.refreshes]
            else:
                at = [(end, state.upper()) for _, end, state in spans]
            point = {"type": "scatter", "mode": "markers", "opacity": 0, "meta": {"run": i}, "name": label(lanes[-1])}
            point |= {"x": [step for step, _ in at], "y": [y + 0.2] * len(at), "text": [label(text) for _, text in at]}
            traces.append(point | {"hovertemplate": "%{text}"})
    names = {"tickmode": "array", "tickvals": [0.4 - i for i in range(len(lanes))], "showgrid": False}
    axis = names | {"ticktext": ticks, "range": [0.9 - len(lanes), 1.0]}
    title, empty = "Verdicts: of the angle, and of the change", "" if lanes else "No refresh yet."
    return fig.Panel(title, traces, axis=axis, height=max(30, 26 * len(lanes)), empty=empty)


def _tints(run: Run) -> list[dict[str, Any]]:
    """The verdict behind all panels: LOSING and CONFLICT only, which is what a reader looks for."""
    bad = [(start, end) for start, end, state in (*run.spans, *run.outcomes) if state in ("conflict", "losing")]
    place = {"type": "rect", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below", "line": {"width": 0}}
    return [place | {"x0": start, "x1": end, "fillcolor": fig.VERMILLION, "opacity": 0.05} for start, end in bad]


def _rate(drawn: _Drawn, k: int) -> fig.Panel:
    traces: list[fig.Trace] = []
    name, found = f"pass_at_{k}", False
    for i, run in enumerate(drawn.runs):
        steps, fused, rates = run.ends, run.column(name, "change"), run.column(name)
        errors, spread = run.column(f"{name}_se", "change"), run.column(f"{name}_se")
        found = found or _any(rates)
        if _any(fused):
            traces.append(drawn.dots(i, f"pass@{k} measured", run.steps, rates, spread))
            reach, what = quantile(run.confidence), f"pass@{k} fused"
        else:
            steps, fused, errors, reach, what = run.steps, rates, spread, 1.0, f"pass@{k}"
        traces.append(drawn.band(i, steps, _plus(fused, errors, -reach), _plus(fused, errors, reach)))
        traces.append(drawn.line(i, what, steps, fused))
    return fig.Panel(f"pass@{k}", traces, empty="" if found else f"No refresh has measured pass@{k}.")


def _change(drawn: _Drawn, k: int) -> fig.Panel:
    traces: list[fig.Trace] = []
    for i, run in enumerate(drawn.runs):
        names = ("total", "total_ci_low", "total_ci_high", "change", "change_se")
        total, low, high, change, error = (run.column(f"pass_at_{k}_{name}", "change") for name in names)
        traces += [drawn.band(i, run.ends, low, high), drawn.line(i, f"pass@{k} in total", run.ends, total)]
        traces.append(drawn.dots(i, f"pass@{k} in window", run.ends, change, error))
    missed = missed_in_words(max(run.missed for run in drawn.runs))
    return fig.Panel(f"Change of pass@{k}, per window and in total{missed}", traces, axis={"zeroline": True})


def _cosine(drawn: _Drawn) -> fig.Panel:
    traces: list[fig.Trace] = []
    for i, run in enumerate(drawn.runs):
        cosine, steps = run.column("cosine"), run.steps
        low, high = run.column("cosine_ci_low"), run.column("cosine_ci_high")
        traces += [drawn.band(i, steps, low, high), drawn.line(i, "cosine", steps, cosine)]
        gaps = fig.stretches([value is None for value in cosine])
        spans = [(steps[max(gap.start - 1, 0)], steps[min(gap.stop, len(steps) - 1)]) for gap in gaps]
        hatched: fig.Trace = {"fillpattern": {"shape": "/", "size": 6, "fgcolor": fig.GREY, "bgcolor": "rgba(0,0,0,0)"}}
        traces.append(fig.area(*fig.boxes(spans, -1, 1), fig.GREY, 0.3, meta={"run": i}, **hatched))
    reasons = [str(event.get("reason")) for run in drawn.runs for event in run.refreshes if event.get("reason")]
    found = any(_any(run.column("cosine")) for run in drawn.runs)
    empty = "" if found else "Not determined at any refresh" + (f": {reasons[-1]}" if reasons else ".")
    levels = [(max(-1.0, min(1.0, t)), "threshold") for t in sorted({run.threshold for run in drawn.runs})]
    title, axis = "Cosine of the gradients of pass@1 and pass@k", {"range": [-1.05, 1.05]}
    return fig.Panel(title, traces, levels, axis, empty=empty)


def _evidence(drawn: _Drawn) -> list[fig.Panel]:
    traces: list[fig.Trace] = []
    for i, run in enumerate(drawn.runs):
        of = (("run_p_value", "refresh", "conflict"), ("losing_p_value", "change", "losing"))
        for j, (name, kind, what) in enumerate(of):
            steps = run.ends if kind == "change" else run.steps
            shown = [None if v is None or v <= 0 else max(v, 1e-12) for v in run.column(name, kind)]
            if _any(shown):
                more = {"dash": ("solid", "dot")[j], "yhoverformat": ".2g"}
                traces.append(drawn.line(i, f"p of {what}", steps, shown, **more))
    if not traces:
        return []
    levels = [(1 - c, f"{1 - c:.2g}") for c in sorted({run.confidence for run in drawn.runs})]
    axis = {"type": "log", "dtick": 2, "exponentformat": "power"}
    return [fig.Panel("p over the whole run: conflict (solid), losing (dotted)", traces, levels, axis)]


def _any(values: fig.Column) -> bool:
    return any(value is not None for value in values)


def _range(values: Sequence[float], room: float) -> list[float]:
    low, high = min(values), max(values)
    return [low - 0.02 * (high - low or 1), high + room * (high - low or 1)]


def _plus(values: fig.Column, errors: fig.Column, times: float) -> fig.Column:
    return [None if v is None or e is None else v + times * e for v, e in zip(values, errors, strict=True)]


def _extents(runs: Sequence[Run], ks: Sequence[int]) -> list[str]:
    rows = [(f"pass_at_{k}", f"pass@{k}") for k in ks] + [("cosine", "the cosine")]
    drawn = _Drawn(runs)
    return [f"{drawn.named(what, run)} {_extent(run.column(name))}" for run in runs for name, what in rows]


def _extent(values: fig.Column) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "is undetermined throughout"
    first, last, least, most = map(write_number, (known[0], known[-1], min(known), max(known)))
    return f"from {first} to {last}, between {least} and {most}"
