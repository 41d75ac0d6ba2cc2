"""The figures of runs over each other: colour and dashes tell the run, one crosshair reads all panels at a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from passk_guard.change import missed_in_words
from passk_guard.reporting.html.figures import (
    COLOURS,
    DASHES,
    GREEN,
    GREY,
    OCHRE,
    SYMBOLS,
    VERMILLION,
    Column,
    Figure,
    Panel,
    Trace,
    area,
    band,
    boxes,
    curve,
    dots,
    stacked,
    stretches,
)
from passk_guard.reporting.html.text import label, write_number
from passk_guard.reporting.run import FAILED, Run, quantile, state_of

# (colour, height in its lane, opacity): states differ in more than colour.
_STATES = {
    "losing": (VERMILLION, 0.9, 0.75),
    "conflict": (VERMILLION, 0.9, 0.75),
    "undetermined": (GREY, 0.3, 0.35),
    "clear": (GREEN, 0.55, 0.6),
    "holding": (GREEN, 0.55, 0.6),
    "gaining": (GREEN, 0.75, 0.75),
    FAILED: (OCHRE, 0.12, 0.9),
}
_MITIGATION = (
    ("floor", "Floor under the prompt weights", ("refresh", "steps")),
    ("gamma", "gamma", ("refresh", "steps")),
    ("hold_lambda", "lambda of the hold", ("refresh", "steps")),
    ("train_cosine", "Cosine of the training gradient and the protected direction, before", ("steps",)),
    ("mitigated", "Share of steps that were changed", ("steps",)),
    ("coefficient", "Coefficient of the protected direction", ("steps",)),
    ("protected_reliability", "Share of the protected direction that is no noise", ("refresh",)),
)
_INTERFERENCE = (
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

    def line(self, i: int, what: str, x: Column, y: Column, **more: Any) -> Trace:
        dash = more.pop("dash", DASHES[i % 4])
        colour = more.pop("colour", COLOURS[i % 6])
        return curve(self.named(what, self.runs[i]), x, y, colour, dash, meta={"run": i}, **more)

    def dots(self, i: int, what: str, x: Column, y: Column, error: Column, **more: Any) -> Trace:
        name = self.named(what, self.runs[i])
        return dots(name, x, y, error, COLOURS[i % 6], SYMBOLS[i % 4], meta={"run": i}, **more)

    def band(self, i: int, x: Column, low: Column, high: Column, **more: Any) -> Trace:
        return band(x, low, high, COLOURS[i % 6], meta={"run": i}, **more)


def main_figure(runs: Sequence[Run]) -> Figure:
    """Verdicts, pass rates, changes, cosine and evidence over the steps of training."""
    drawn = _Drawn(runs)
    ks = sorted({1, *(k for run in runs for k in run.ks)})
    measured = [k for k in ks if any(run.columns(f"pass_at_{k}_change", "change")[0] for run in runs)]
    panels = [
        _verdicts(drawn),
        *(_rate(drawn, k) for k in ks),
        *(_change(drawn, k) for k in measured),
        _cosine(drawn),
        *_evidence(drawn),
    ]
    lines = [f"{run.name}: {run.headline[0]}" if len(runs) > 1 else run.headline[0] for run in runs]
    note = (
        "Open marks: one measurement ± 1 standard error. Line and band: all measurements fused, or the total of the "
        "windows, with its interval. Verdicts: a full bar is LOSING or CONFLICT, half a bar CLEAR, HOLDING or GAINING, "
        "a thin one undetermined. Hatched: the cosine is not determined. Point at a step, or use the arrow keys."
    )
    return stacked(
        panels,
        title="Over training",
        alt=" ".join(lines) + " " + "; ".join(_extents(runs, ks)) + ".",
        x_title="step",
        note=note,
        shapes=_tints(runs[0]) if len(runs) == 1 else (),
    )


def who_pays(runs: Sequence[Run]) -> Figure | None:
    """The change of pass@1 since the start, by solve rate and by group; None without windows."""
    shown = [(i, run, run.by_group) for i, run in enumerate(runs) if run.windows]
    if not shown:
        return None
    drawn, panels, alts = _Drawn(runs), [], []
    for i, run, groups in shown:
        steps = [event["step"] for event in run.windows]
        lines = [
            drawn.line(i, name, steps, totals, colour=COLOURS[j % 6], dash=DASHES[j % 4])
            for j, (name, totals) in enumerate(groups.items())
        ]
        ends = [_end(steps[-1], totals[-1], name, COLOURS[j % 6]) for j, (name, totals) in enumerate(groups.items())]
        panels.append(Panel(drawn.named("Change of pass@1 since the start", run), [*lines, *ends], height=200))
        last = ", ".join(f"{name} {write_number(totals[-1], 0.001)}" for name, totals in groups.items())
        alts.append(drawn.named(f"At the end: {last}", run))
    room = {"range": _range([step for _, run, _ in shown for step in (0, run.windows[-1]["step"])], 0.2)}
    note = "Hard, medium and easy by the solve rate of other samples; the three add up to the change of pass@1."
    return stacked(panels, title="Who pays", alt="; ".join(alts) + ".", x_title="step", note=note, **room)


def mitigation_figure(runs: Sequence[Run]) -> Figure | None:
    """Floor, gamma or lambda, and what projection did; None where no run has any."""
    return _singles(runs, _MITIGATION, "Mitigation over training")


def interference_figure(runs: Sequence[Run]) -> Figure | None:
    """k*, agreement, negative pairs and the effective samples; None where no run has any."""
    return _singles(runs, _INTERFERENCE, "Interference over training")


def _singles(runs: Sequence[Run], rows: Iterable[tuple[str, str, tuple[str, ...]]], title: str) -> Figure | None:
    drawn, panels, alts = _Drawn(runs), [], []
    for name, what, kinds in rows:
        lines = []
        for i, run in enumerate(runs):
            steps, values = run.columns(name, *kinds)
            if any(value is not None for value in values):
                lines.append(drawn.line(i, name, steps, values))
                alts.append(f"{drawn.named(what, run)} {_extent(values)}")
        if lines:
            panels.append(Panel(what, lines, height=100))
    return stacked(panels, title=title, alt="; ".join(alts) + ".", x_title="step") if panels else None


def _verdicts(drawn: _Drawn) -> Panel:
    traces: list[Trace] = []
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
                    traces.append(area(*boxes(here, y, y + height), colour, opacity, meta={"run": i}))
            if what == "angle":
                at = [(event["step"], state_of(event).upper()) for event in run.refreshes]
            else:
                at = [(end, state.upper()) for _, end, state in spans]
            point = {"type": "scatter", "mode": "markers", "opacity": 0, "meta": {"run": i}, "name": label(lanes[-1])}
            point |= {"x": [step for step, _ in at], "y": [y + 0.2] * len(at), "text": [label(text) for _, text in at]}
            traces.append(point | {"hovertemplate": "%{text}"})
    names = {"tickmode": "array", "tickvals": [0.4 - i for i in range(len(lanes))], "showgrid": False}
    axis = names | {"ticktext": ticks, "range": [0.9 - len(lanes), 1.0]}
    return Panel(
        "Verdicts: of the angle, and of the change",
        traces,
        axis=axis,
        height=max(30, 26 * len(lanes)),
        empty="" if lanes else "No refresh yet.",
    )


def _tints(run: Run) -> list[dict[str, Any]]:
    """The verdict behind all panels: LOSING and CONFLICT only, which is what a reader looks for."""
    colours = {"conflict": VERMILLION, "losing": VERMILLION}
    bad = [(start, end, state) for start, end, state in (*run.spans, *run.outcomes) if state in colours]
    place = {"type": "rect", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below", "line": {"width": 0}}
    return [place | {"x0": start, "x1": end, "fillcolor": colours[s], "opacity": 0.05} for start, end, s in bad]


def _rate(drawn: _Drawn, k: int) -> Panel:
    traces: list[Trace] = []
    name = f"pass_at_{k}"
    for i, run in enumerate(drawn.runs):
        steps, fused = run.columns(name, "change")
        errors = run.columns(f"{name}_se", "change")[1]
        rates, spread = run.column(name), run.column(f"{name}_se")
        if len(errors) == len(fused) and any(value is not None for value in fused):
            reach = quantile(run.confidence)
            traces.append(drawn.band(i, steps, _plus(fused, errors, -reach), _plus(fused, errors, reach)))
            traces.append(drawn.line(i, f"pass@{k} fused", steps, fused))
            traces.append(drawn.dots(i, f"pass@{k} measured", run.steps, rates, spread))
        else:
            traces.append(drawn.band(i, run.steps, _plus(rates, spread, -1), _plus(rates, spread, 1)))
            traces.append(drawn.line(i, f"pass@{k}", run.steps, rates))
    found = any(value is not None for run in drawn.runs for value in run.column(name))
    return Panel(f"pass@{k}", traces, empty="" if found else f"No refresh has measured pass@{k}.")


def _change(drawn: _Drawn, k: int) -> Panel:
    traces: list[Trace] = []
    name = f"pass_at_{k}"
    for i, run in enumerate(drawn.runs):
        steps, totals = run.columns(f"{name}_total", "change")
        ends = [run.columns(f"{name}_total_ci_{end}", "change")[1] for end in ("low", "high")]
        if totals and len(ends[0]) == len(ends[1]) == len(totals):
            traces.append(drawn.band(i, steps, *ends))
        traces.append(drawn.line(i, f"pass@{k} in total", steps, totals))
        steps, changes = run.columns(f"{name}_change", "change")
        errors = run.columns(f"{name}_change_se", "change")[1]
        traces.append(
            drawn.dots(i, f"pass@{k} in window", steps, changes, errors if len(errors) == len(changes) else [])
        )
    missed = missed_in_words(max(run.missed for run in drawn.runs))
    return Panel(f"Change of pass@{k}, per window and in total{missed}", traces, [(0.0, "")])


def _cosine(drawn: _Drawn) -> Panel:
    traces: list[Trace] = []
    for i, run in enumerate(drawn.runs):
        cosine, steps = run.column("cosine"), run.steps
        low, high = run.column("cosine_ci_low"), run.column("cosine_ci_high")
        traces += [drawn.band(i, steps, low, high), drawn.line(i, "cosine", steps, cosine)]
        gaps = stretches([value is None for value in cosine])
        spans = [(steps[max(gap.start - 1, 0)], steps[min(gap.stop, len(steps) - 1)]) for gap in gaps]
        hatched: Trace = {"fillpattern": {"shape": "/", "size": 6, "fgcolor": GREY, "bgcolor": "rgba(0,0,0,0)"}}
        traces.append(area(*boxes(spans, -1, 1), GREY, 0.3, meta={"run": i}, **hatched))
    reasons = [str(event.get("reason")) for run in drawn.runs for event in run.refreshes if event.get("reason")]
    found = any(value is not None for run in drawn.runs for value in run.column("cosine"))
    empty = "" if found else "Not determined at any refresh" + (f": {reasons[-1]}" if reasons else ".")
    levels = [(max(-1.0, min(1.0, t)), "threshold") for t in sorted({run.threshold for run in drawn.runs})]
    return Panel("Cosine of the gradients of pass@1 and pass@k", traces, levels, {"range": [-1.05, 1.05]}, empty=empty)


def _evidence(drawn: _Drawn) -> list[Panel]:
    traces: list[Trace] = []
    for i, run in enumerate(drawn.runs):
        of = (("run_p_value", "refresh", "conflict"), ("losing_p_value", "change", "losing"))
        for j, (name, kind, what) in enumerate(of):
            steps, values = run.columns(name, kind)
            shown = [None if v is None or v <= 0 else max(v, 1e-12) for v in values]
            if any(value is not None for value in shown):
                more = {"dash": ("solid", "dot")[j], "yhoverformat": ".2g"}
                traces.append(drawn.line(i, f"p of {what}", steps, shown, **more))
    if not traces:
        return []
    levels = [(1 - c, f"{1 - c:.2g}") for c in sorted({run.confidence for run in drawn.runs})]
    axis = {"type": "log", "dtick": 2, "exponentformat": "power"}
    return [Panel("p over the whole run: conflict (solid), losing (dotted)", traces, levels, axis)]


def _end(step: int, value: float, name: str, colour: str) -> Trace:
    """The name of a line at its end."""
    found = {"type": "scatter", "mode": "text", "x": [step], "y": [value], "text": [f" {label(name, 24)}"]}
    return found | {"textposition": "middle right", "textfont": {"color": colour}, "hoverinfo": "skip"}


def _range(values: Sequence[float], room: float) -> list[float]:
    low, high = min(values), max(values)
    return [low - 0.02 * (high - low or 1), high + room * (high - low or 1)]


def _plus(values: Column, errors: Column, times: float) -> Column:
    return [None if v is None or e is None else v + times * e for v, e in zip(values, errors, strict=True)]


def _extents(runs: Sequence[Run], ks: Sequence[int]) -> list[str]:
    rows = [(f"pass_at_{k}", f"pass@{k}") for k in ks] + [("cosine", "the cosine")]
    drawn = _Drawn(runs)
    return [f"{drawn.named(what, run)} {_extent(run.column(name))}" for run in runs for name, what in rows]


def _extent(values: Column) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "is undetermined throughout"
    first, last, least, most = map(write_number, (known[0], known[-1], min(known), max(known)))
    return f"from {first} to {last}, between {least} and {most}"
