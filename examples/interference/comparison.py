"""From the runs of the benchmark to a table and a picture: changes in pass@1 and pass@k, with intervals over seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from examples.interference.arms import ARMS, CORE, SETTINGS

Record = dict[str, Any]
_RESAMPLES = 10_000
_MARKERS = "os^DvP*X<>hdp8"
_COLOURS = (
    "#000000",
    "#0072B2",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#E69F00",
    "#7F7F7F",
    "#8C6D31",
    "#4B0082",
    "#A6761D",
    "#66A61E",
)


def read(path: Path) -> list[Record]:
    """The runs in a file of JSON lines; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def append(path: Path, record: Record) -> None:
    """Add one run, as one line, after whatever whole lines are there."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


@dataclass(frozen=True)
class Change:
    """How much a pass rate moved over the runs of one arm.

    Attributes:
        each: per seed, from before training to after it.
        low, high: 95% percentile bootstrap interval of the mean over seeds.
    """

    each: tuple[float, ...]
    low: float
    high: float

    @property
    def mean(self) -> float:
        return sum(self.each) / len(self.each)

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def change(runs: Sequence[Record], name: str) -> Change:
    """Of `name`, e.g. "pass_at_1", over these runs."""
    each = torch.tensor([r["trajectory"][-1][name] - r["trajectory"][0][name] for r in runs], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    means = each[torch.randint(len(each), (_RESAMPLES, len(each)), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Change(tuple(each.tolist()), low, high)


def lowest(runs: Sequence[Record], every: int = 20) -> float | None:
    """Mean over seeds of the deepest pass@1 on the way, against the start, seen every so many steps.

    The oldest runs were evaluated every 20 steps, the others every 5; None where a run was seen less often than asked.
    """
    if any(r["trajectory"][1]["step"] > every for r in runs):
        return None
    dips = []
    for run in runs:
        seen = [x["pass_at_1"] for x in run["trajectory"] if x["step"] % every == 0 or x is run["trajectory"][-1]]
        dips.append(min(seen) - seen[0])
    return sum(dips) / len(dips)


def runs_of(records: Sequence[Record], setting: str, arm: str) -> list[Record]:
    """By seed; where a run was made twice, the newest."""
    found = {r["seed"]: r for r in records if r["setting"] == setting and r["arm"] == arm}
    return [found[seed] for seed in sorted(found)]


def kept(records: Sequence[Record], setting: str, arm: str, unguarded_arm: str = "none") -> float | None:
    """Gain in pass@k as a share of the unguarded gain, on the seeds both have."""
    mine, unguarded = runs_of(records, setting, arm), runs_of(records, setting, unguarded_arm)
    shared = {r["seed"] for r in mine} & {r["seed"] for r in unguarded}
    if not shared:
        return None
    name = f"pass_at_{mine[0]['k']}"
    gains = [change([r for r in runs if r["seed"] in shared], name).mean for runs in (mine, unguarded)]
    return gains[0] / gains[1] if gains[1] > 0 else None


def print_table(console: Console, setting: str, records: Sequence[Record]) -> None:
    """One row for each arm; pass rates are exact, on 768 held-out prompts."""
    k = SETTINGS[setting].k
    table = Table(title=f"{setting}: {SETTINGS[setting].title}", caption="mean over seeds [95% bootstrap interval]")
    table.add_column("arm")
    lows = ("lowest, every 20 steps", "every 5")
    for heading in ("seeds", "change of pass@1", "worst seed", *lows, f"change of pass@{k}", "gain kept"):
        table.add_column(heading, justify="right")
    for arm in ARMS:
        if runs := runs_of(records, setting, arm):
            one, many, share = change(runs, "pass_at_1"), change(runs, f"pass_at_{k}"), kept(records, setting, arm)
            dips = ["-" if dip is None else f"{dip:+.3f}" for dip in (lowest(runs), lowest(runs, 5))]
            part = "-" if share is None else f"{share:.0%}"
            table.add_row(ARMS[arm].label, str(len(runs)), str(one), f"{min(one.each):+.3f}", *dips, str(many), part)
    console.print(table)


def draw(path: Path, records: Sequence[Record]) -> None:
    """Change of pass@1 against change of pass@k, an arm a point with its intervals, a panel for each setting."""
    settings = [name for name in SETTINGS if any(r["setting"] == name for r in records)]
    across = min(3, len(settings))
    rows = -(-len(settings) // across)
    figure = Figure(figsize=(4.2 * across + (2.6 if rows == 1 else 0), 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, across, squeeze=False).flatten().tolist()
    for axes, setting in zip(panels, settings, strict=False):
        for i, arm in enumerate(ARMS):
            if runs := runs_of(records, setting, arm):
                one, many = change(runs, "pass_at_1"), change(runs, f"pass_at_{SETTINGS[setting].k}")
                axes.errorbar(
                    one.mean,
                    many.mean,
                    xerr=[[one.mean - one.low], [one.high - one.mean]],
                    yerr=[[many.mean - many.low], [many.high - many.mean]],
                    fmt=_MARKERS[i % len(_MARKERS)],
                    color=_COLOURS[i % len(_COLOURS)],
                    markersize=8 if arm in CORE else 6,
                    capsize=2,
                    label=ARMS[arm].label,
                )
        axes.axvline(0, color="#999999", linewidth=0.8)
        axes.set(
            title=SETTINGS[setting].title, xlabel="change of pass@1", ylabel=f"change of pass@{SETTINGS[setting].k}"
        )
        axes.title.set_fontsize(9)
        axes.locator_params(nbins=5)
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    free = panels[len(settings) :]
    for axes in free:
        axes.axis("off")
    if free:
        free[0].legend(handles.values(), handles.keys(), loc="center", fontsize=9)
    else:
        figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
