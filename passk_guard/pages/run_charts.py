"""The pictures of a run, or of two over each other: colour tells the quantity, dashes and shapes the run."""

from __future__ import annotations

from collections.abc import Sequence

from passk_guard.pages.axes import write_number
from passk_guard.pages.charts import Band, Series, line_chart
from passk_guard.pages.frame import Level, Upright
from passk_guard.pages.html import Html
from passk_guard.pages.run_numbers import Run, alerts, floor_column, mean, steps_column, verdict_spans
from passk_guard.pages.timeline import Look, timeline

LOOKS = {
    "conflict": Look(colour=1),
    "clear": Look(colour=2, height=0.4),
    "undetermined": Look(colour=5, height=0.7, filled=False),
    "void refresh": Look(colour=5, height=0.25, filled=False, dash=2),
}
_MOST_MARKS = 12  # vertical lines of one run; a verdict that flips more often is read from the timeline


def rate_charts(runs: Sequence[Run]) -> list[Html]:
    """Pass rates with their standard errors: one picture of one run, one for each k of two."""
    ks = [1, *sorted({k for run in runs for k in run.ks})]
    groups = [ks] if len(runs) == 1 else [[k] for k in ks]
    return [_rates(runs, group, ks) for group in groups]


def cosine_chart(runs: Sequence[Run]) -> Html:
    """cos(grad J_k, grad J_1) with its interval and the threshold; no curve where the probe does not determine it."""
    series = [Series(_named("cosine", run, runs), run.steps, run.column("cosine"), i, i) for i, run in enumerate(runs)]
    bands = [
        Band(
            run.steps,
            run.column("cosine_ci_low"),
            run.column("cosine_ci_high"),
            _named(f"{100 * run.confidence:g}% interval", run, runs),
            i,
        )
        for i, run in enumerate(runs)
    ]
    told = [f"{_named('the cosine', run, runs)} {_span(run.column('cosine'))}" for run in runs]
    return line_chart(
        series,
        bands,
        _marks(runs),
        x_label="step",
        y_label="cosine",
        alt="; ".join(told) + ". Gaps: undetermined.",
        title="cos(pass@1 gradient, pass@k gradient)",
        levels=[Level(t, f"threshold {write_number(t)}") for t in sorted({run.threshold for run in runs})],
        y_range=(-1.0, 1.0),
    )


def refresh_chart(
    runs: Sequence[Run], name: str, title: str, y_label: str, y_range: tuple[float, float] | None = None
) -> Html | None:
    """One number of the refreshes; None where no run has it."""
    columns = [(run.steps, run.column(name)) for run in runs]
    return _single(runs, columns, title, y_label, y_range)


def step_chart(
    runs: Sequence[Run], name: str, title: str, y_label: str, y_range: tuple[float, float] | None = None
) -> Html | None:
    """One number of the guarded steps; None where no run has it."""
    columns: list[tuple[list[int], list[float | None]]] = [steps_column(run, name) for run in runs]
    return _single(runs, columns, title, y_label, y_range)


def floor_chart(runs: Sequence[Run]) -> Html | None:
    """The floor under the prompt weights; None where no run reweights."""
    return _single(runs, [floor_column(run) for run in runs], "Floor under the prompt weights", "floor", None)


def verdict_chart(runs: Sequence[Run]) -> Html:
    """The standing verdict from refresh to refresh."""
    lanes = {_named("verdict", run, runs): verdict_spans(run) for run in runs}
    present = {span.state for lane in lanes.values() for span in lane}
    told = []
    for name, lane in lanes.items():
        counts = [f"{n} {state}" for state in LOOKS if (n := sum(span.state == state for span in lane))]
        told.append(f"{name}: {', '.join(counts)}")
    looks = {state: look for state, look in LOOKS.items() if state in present}
    return timeline(lanes, looks, x_label="step", alt="Refreshes by state. " + "; ".join(told), title="Verdict")


def _rates(runs: Sequence[Run], group: Sequence[int], ks: Sequence[int]) -> Html:
    series, bands, told = [], [], []
    for i, run in enumerate(runs):
        for k in group:
            colour, name = ks.index(k), f"pass_at_{k}"
            rates, errors = run.column(name), run.column(f"{name}_se")
            dash = colour if len(runs) == 1 else i
            series.append(Series(_named(f"pass@{k}", run, runs), run.steps, rates, colour, dash))
            bands.append(_error_band(run.steps, rates, errors, colour))
            told.append(f"{_named(f'pass@{k}', run, runs)} {_span(rates)}")
    title = ", ".join(f"pass@{k}" for k in group)
    alt = "; ".join(told)
    return line_chart(series, bands, _marks(runs), x_label="step", y_label="pass rate", alt=alt, title=title)


def _error_band(
    steps: Sequence[int], rates: Sequence[float | None], errors: Sequence[float | None], colour: int
) -> Band:
    pairs = [(None, None) if r is None or e is None else (r - e, r + e) for r, e in zip(rates, errors, strict=True)]
    return Band(steps, [low for low, _ in pairs], [high for _, high in pairs], "± 1 standard error", colour)


def _single(
    runs: Sequence[Run],
    columns: Sequence[tuple[list[int], list[float | None]]],
    title: str,
    y_label: str,
    y_range: tuple[float, float] | None,
) -> Html | None:
    series, told = [], []
    for i, (run, (steps, values)) in enumerate(zip(runs, columns, strict=True)):
        if mean(values) is not None:
            series.append(Series(_named(y_label, run, runs), steps, values, i, i))
            told.append(f"{_named(y_label, run, runs)} {_span(values)}")
    if not series:
        return None
    return line_chart(series, x_label="step", y_label=y_label, alt="; ".join(told), title=title, y_range=y_range)


def _marks(runs: Sequence[Run]) -> list[Upright]:
    looks = {"CONFLICT": 1, "CLEAR": 2, "BLIND": 3}
    marks = []
    for i, run in enumerate(runs):
        for step, kind, text in alerts(run)[:_MOST_MARKS]:
            label = _named(f"alert: {kind}", run, runs)
            marks.append(
                Upright(step, label, looks.get(kind, 5), dash=2 if i == 0 else 3, title=f"step {step}: {text}")
            )
    return marks


def _named(what: str, run: Run, runs: Sequence[Run]) -> str:
    return what if len(runs) == 1 else f"{what}, {run.name}"


def _span(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "is undetermined throughout"
    return f"from {write_number(known[0])} to {write_number(known[-1])}, between {_ends(known)}"


def _ends(known: Sequence[float]) -> str:
    return f"{write_number(min(known))} and {write_number(max(known))}"
