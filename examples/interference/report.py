"""What a run has shown: the numbers, a table, a figure, and whether the claim of the demo held.

Left out: averaging over seeds. Each run stands on its own figure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Record = dict[str, float]
Alarm = tuple[int, float | None]
"""Step of an alarm, and the share of the whole fall of pass@1 that came after it; None where pass@1 did not fall."""

Z_95 = 1.96
# Okabe and Ito: told apart with any colour vision, and in grey.
PASS_1, PASS_K, GUARD, EXACT, ALARM = "#D55E00", "#0072B2", "#009E73", "#000000", "#666666"


@dataclass(frozen=True)
class Summary:
    """The run in a few numbers.

    Attributes:
        pass_1, pass_k: exact (start, end) on held-out test prompts.
        losing, conflict: the first alarm of each kind, None without one.
    """

    k: int
    pass_1: tuple[float, float]
    pass_k: tuple[float, float]
    losing: Alarm | None
    conflict: Alarm | None

    def failures(self) -> list[str]:
        """Why the demo did not show what it is there to show; empty when it did."""
        failed = []
        if self.pass_1[1] >= self.pass_1[0]:
            failed.append("pass@1 did not fall: {:.3f} -> {:.3f}".format(*self.pass_1))
        if self.pass_k[1] <= self.pass_k[0]:
            failed.append("pass@{} did not rise: {:.3f} -> {:.3f}".format(self.k, *self.pass_k))
        for name, alarm in self.alarms.items():
            if alarm is None:
                failed.append(f"the guard never said {name}")
            elif alarm[1] is not None and alarm[1] <= 0.5:
                failed.append(
                    f"{name} came late, at step {alarm[0]}: only {alarm[1]:.0%} of the fall of pass@1 was still to come"
                )
        return failed

    @property
    def alarms(self) -> dict[str, Alarm | None]:
        """The first alarm of each kind by its name."""
        return {"LOSING": self.losing, "CONFLICT": self.conflict}

    def guarded_failures(self) -> list[str]:
        """Why a guarded run did not show what it is there to show; empty when it did."""
        failed = []
        if self.pass_1[1] < self.pass_1[0] - 0.02:
            failed.append("guarded, pass@1 fell all the same: {:.3f} -> {:.3f}".format(*self.pass_1))
        if self.pass_k[1] <= self.pass_k[0]:
            failed.append("guarded, pass@{} did not rise: {:.3f} -> {:.3f}".format(self.k, *self.pass_k))
        return failed


def read_events(path: Path) -> list[dict]:
    """The guard's own record: one JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def alarms_of(events: Sequence[dict], verdict: str) -> list[dict]:
    """Events in which a verdict of the guard changed to this one: "losing" on the outcome, "conflict" on the angle."""
    return [e for e in events if e["event"] in ("outcome", "state") and str(e["to"]).lower() == verdict]


def summarise(records: Sequence[Record], events: Sequence[dict], k: int) -> Summary:
    """Put the exact evaluations and the guard's events together."""
    start, end = records[0], records[-1]
    fall = start["pass_at_1"] - end["pass_at_1"]

    def first(verdict: str) -> Alarm | None:
        steps = [event["step"] for event in alarms_of(events, verdict)]
        if not steps:
            return None
        to_come = (value_at(records, steps[0], "pass_at_1") - end["pass_at_1"]) / fall if fall > 0 else None
        return steps[0], to_come

    return Summary(
        k=k,
        pass_1=(start["pass_at_1"], end["pass_at_1"]),
        pass_k=(start[f"pass_at_{k}"], end[f"pass_at_{k}"]),
        losing=first("losing"),
        conflict=first("conflict"),
    )


def value_at(records: Sequence[Record], step: int, name: str) -> float:
    """An exact value at any step, linear between the two evaluations around it."""
    for before, after in pairwise(records):
        if before["step"] <= step <= after["step"]:
            part = (step - before["step"]) / (after["step"] - before["step"])
            return before[name] + part * (after[name] - before[name])
    raise ValueError(f"Expected a step between {records[0]['step']} and {records[-1]['step']}; found {step}.")


def write_results(path: Path, records: Sequence[Record], summary: Summary) -> None:
    """The exact evaluations and the summary, one JSON object a line."""
    lines = [{"event": "exact", **record} for record in records] + [{"event": "summary", **asdict(summary)}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def print_table(console: Console, title: str, records: Sequence[Record], summary: Summary) -> None:
    """pass@1 and pass@k at the start and the end, over all test prompts and per kind."""
    start, end = records[0], records[-1]
    table = Table(title=title, title_justify="left")
    table.add_column("test prompts")
    for name in ("pass@1", f"pass@{summary.k}"):
        for column in (f"{name}\nstart", f"{name}\nend", "\nchange"):
            table.add_column(column, justify="right")
    for label, prefix in [("all", ""), ("easy, 70 %", "easy/"), ("hard, 15 %", "hard/"), ("neutral, 15 %", "neutral/")]:
        cells = []
        for j in (1, summary.k):
            name = f"{prefix}pass_at_{j}"
            cells += [f"{start[name]:.3f}", f"{end[name]:.3f}", f"{end[name] - start[name]:+.3f}"]
        table.add_row(label, *cells, end_section=label == "all")
    console.print(table)


def print_alarms(console: Console, summary: Summary, events: Sequence[dict]) -> None:
    """The lines with which the guard raised its alarms, and what was still to come then."""
    for verdict in ("losing", "conflict"):
        for event in alarms_of(events, verdict)[:1]:
            console.print(event["message"], soft_wrap=True, markup=False, highlight=False)
    table = Table(title="alarms", title_justify="left")
    table.add_column("the guard says")
    for column in ("first at step", "fall of pass@1 still to come"):
        table.add_column(column, justify="right")
    for name, alarm in summary.alarms.items():
        step, to_come = (None, None) if alarm is None else alarm
        table.add_row(name, "never" if step is None else str(step), "-" if to_come is None else f"{to_come:.0%}")
    console.print(table)


def draw(path: Path, records: Sequence[Record], events: Sequence[dict], k: int, guarded: Sequence[Record] = ()) -> None:
    """Two panels over training steps: what happened to pass@1 and pass@k, and what the observing guard saw.

    Args:
        records: of the unguarded run.
        events: of the guard that observed it.
        guarded: of a guarded run from the same start, drawn beside it in the upper panel.
    """
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[7, 4])
    _draw_pass_rates(top, records, events, k, guarded)
    _draw_cosine(bottom, records, events, k)
    for line, (verdict, style) in enumerate((("losing", "-"), ("conflict", "--"))):
        for step in (event["step"] for event in alarms_of(events, verdict)):
            for axes in (top, bottom):
                axes.axvline(step, color=ALARM, linewidth=1, linestyle=style)
            top.annotate(
                f"{verdict.upper()}, step {step}", (step, 1.0), (4, -4 - 12 * line),
                xycoords=("data", "axes fraction"), textcoords="offset points", va="top", color=ALARM, fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    bottom.set_xticks(range(0, records[-1]["step"] + 1, max(1, records[-1]["step"] // 6)))
    # Room on the right for the labels of the lines.
    top.set_xlim(0, records[-1]["step"] * (1.32 if guarded else 1.22))
    bottom.set_xlabel("optimizer step")
    figure.savefig(path, dpi=160)


def _draw_pass_rates(
    axes: Axes, records: Sequence[Record], events: Sequence[dict], k: int, guarded: Sequence[Record]
) -> None:
    for name, label, color in ((f"pass_at_{k}", f"pass@{k}", PASS_K), ("pass_at_1", "pass@1", PASS_1)):
        axes.axhline(records[0][name], color=color, linestyle=":", linewidth=0.8, alpha=0.7)
        for run, style, arm in ((records, "-", ""), (guarded, "--", "guarded ")):
            if not run:
                continue
            steps, values = [r["step"] for r in run], [r[name] for r in run]
            axes.plot(steps, values, color=color, linewidth=2, linestyle=style)
            other = (records if run is guarded else guarded or records)[-1][name]
            side = "center" if abs(values[-1] - other) > 0.03 else "bottom" if values[-1] > other else "top"
            _label(axes, steps[-1], values[-1], f"{arm}{label} {values[-1] - values[0]:+.3f}", color, side)
        _draw_measured(axes, events, name, color)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.15 * (high - low))  # room for the labels of the alarms
    axes.set_ylabel("success rate")
    lines = "exact rates on held-out prompts" + (" (dashed: guarded)" if guarded else "")
    axes.set_title(f"GRPO on pass@{k}, {lines}\ndots and 95% bands: measured by the guard", loc="left", fontsize=10)


def _draw_measured(axes: Axes, events: Sequence[dict], name: str, color: str) -> None:
    """What the guard measured: levels of all its samples and changes between them, fused, with their 95% bands."""
    seen = [e for e in events if e["event"] == "change" and e.get(name) is not None]
    steps, level, error = ([e[field] for e in seen] for field in ("step", name, f"{name}_se"))
    low, high = ([x + sign * Z_95 * se for x, se in zip(level, error, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(steps, level, "o", color=color, markersize=4, markeredgecolor="white", markeredgewidth=0.6)


def _draw_cosine(axes: Axes, records: Sequence[Record], events: Sequence[dict], k: int) -> None:
    seen = [e for e in events if e["event"] == "refresh"]
    steps = [e["step"] for e in seen]
    # A refresh that determines nothing is a gap, never a line drawn across it.
    cosine, low, high = (
        [float("nan") if e[name] is None else e[name] for e in seen]
        for name in ("cosine", "cosine_ci_low", "cosine_ci_high")
    )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.fill_between(steps, low, high, color=GUARD, alpha=0.2, linewidth=0)
    axes.plot(steps, cosine, color=GUARD, linewidth=2, marker="o", markersize=4)
    axes.plot([r["step"] for r in records], [r["cosine"] for r in records], ".", color=EXACT, markersize=5)
    # While there is something to warn of, the upper left corner is empty.
    for line, text, color in (
        (0, "guard (refreshes pooled), 95% band; gap: no signal", GUARD),
        (1, "exact, at each step alone", EXACT),
    ):
        axes.annotate(text, (0.125, 0.97 - 0.09 * line), xycoords="axes fraction", va="top", color=color, fontsize=9)
    axes.set_ylim(-1.05, 1.05)
    axes.set_ylabel(f"cos(pass@1, pass@{k})")


def _label(axes: Axes, x: float, y: float, text: str, color: str, side: str) -> None:
    axes.annotate(text, (x, y), (6, 0), textcoords="offset points", va=side, color=color, fontsize=9)
