"""What a file of rollouts says, as a record, as text, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any

from passk_guard.analysis.page import ROLLOUTS_KIND, rollouts_page
from passk_guard.analysis.results import Number, to_json
from passk_guard.analysis.words import aligned, excerpt, value, with_interval
from passk_guard.reporting.html.page import Paged
from passk_guard.reporting.html.text import told_apart, write_number
from passk_guard.utils.errors import GuardError
from passk_guard.utils.files import write_whole
from passk_guard.utils.text import plain_text

VERSION = 1
JSON_NAME, PAGE_NAME = "rollouts.json", "rollouts.html"
_SHOWN = 8


@dataclass(frozen=True)
class RateAtK:
    """At one k: `pass_rate` and `mean_weight` E[w_k], unbiased; `change` of pass@k, None without log-probabilities."""

    k: int
    pass_rate: Number
    mean_weight: Number
    change: Number | None


@dataclass(frozen=True)
class Part:
    """Some of the prompts: those of a group, or with a solve rate in [low, high), at 0 and at 1 exactly that.

    Attributes:
        name: of the group, or the solve rates.
        num_prompts: how many. mean_weight: of w_k at the largest k; for parts by solve rate it describes these samples.
        share_1, share_k: of the absolute advantages of pass@1 and of pass@k at the largest k, in [0, 1].
        change, change_k: of pass@1 and pass@k; None without log-probabilities, and for parts by solve rate.
    """

    name: str
    num_prompts: int
    mean_weight: Number
    share_1: Number
    share_k: Number
    change: Number | None = None
    change_k: Number | None = None


@dataclass(frozen=True)
class PromptRates:
    """One prompt, at the largest k: n and c, p-hat, w_k(p), its share of the pass@k advantages, and the change of p."""

    text: str
    num_samples: int
    num_correct: int
    pass_rate: Number
    weight: Number
    share_k: float
    change: float | None


@dataclass(frozen=True)
class RolloutAnalysis(Paged):
    """What a file of rollouts says.

    Attributes:
        name: of the file. settings: `confidence`, `ks`, `correct_threshold`, `columns` and `cluster_by`.
        num_rollouts, no_verdict: rows, and those without a verdict. fewest, most: rollouts of a kept prompt.
        num_prompts, left_out: prompts kept, and those with fewer verdicts than the largest k, which count nowhere.
        different: share of the completions of a prompt that differ, mean over prompts; None where none are in the file.
        effective_samples: share of the samples that they are worth to the second policy; None without one.
        at_k: one entry for each k, the first of which is 1.
        hard: share of prompts, and of the advantages of pass@1 and of pass@k, with a solve rate below 1/3.
        solve_rates: the histogram, from never to always; empty parts are left out. groups: those of the column `group`.
        change_by_solve_rate: of pass@1, as `passk_guard.change.change_by_solve_rate` groups it; empty without one.
        prompts: all that are kept, in the order of the file.
        version: of this layout.
    """

    kind = ROLLOUTS_KIND
    name: str
    settings: dict[str, Any]
    num_rollouts: int
    no_verdict: int
    fewest: int
    most: int
    num_prompts: int
    left_out: int
    different: float | None
    effective_samples: float | None
    at_k: list[RateAtK]
    hard: Part
    solve_rates: list[Part] = field(repr=False)
    groups: list[Part] = field(repr=False)
    change_by_solve_rate: list[dict[str, Any]] = field(repr=False)
    prompts: list[PromptRates] = field(repr=False)
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON has them: the layout of `rollouts.json`."""
        return asdict(self)

    def to_json(self) -> str:
        """The same as text."""
        return to_json(self.to_dict())

    @property
    def html(self) -> str:
        """The self-contained page."""
        return rollouts_page(self)

    @property
    def k(self) -> int:
        """The largest k."""
        return self.at_k[-1].k

    @property
    def verdict(self) -> str:
        """What matters most, in one or two sentences."""
        k, ends = self.k, [asdict(at) for at in self.at_k[:: max(1, len(self.at_k) - 1)]]
        if self.effective_samples is not None:
            moved = [_moved(f"pass@{at['k']}", at["change"]) for at in ends]
            return f"Between the two policies {'; '.join(moved)}."
        rates = ", ".join(f"pass@{at['k']} {with_interval(at['pass_rate'])}" for at in ends)
        if k == 1:
            return f"{rates}."
        hard = self.hard
        if hard.share_1.value is None or hard.share_k.value is None:
            return f"{rates}. No prompt is solved sometimes: there are no advantages to share."
        return (
            f"{rates}. Hard prompts, solved less than 1/3 of the time, are {hard.num_prompts / self.num_prompts:.0%} "
            f"of all and hold {hard.share_k.value:.0%} of the advantages of pass@{k}, {hard.share_1.value:.0%} of "
            "those of pass@1."
        )

    def about(self) -> list[str]:
        """What was read, as sentences."""
        each = str(self.most) if self.fewest == self.most else f"{self.fewest} to {self.most}"
        found = [f"{self.num_rollouts} rollouts: {each} of each of {self.num_prompts} prompts"]
        if self.left_out:
            found[0] += f", {self.left_out} prompts left out for fewer than {self.k} verdicts"
        if self.no_verdict:
            found.append(f"{self.no_verdict} rollouts have no verdict")
        if self.different is not None:
            found.append(f"{self.different:.0%} of the completions of a prompt differ")
        if self.effective_samples is not None:
            found.append(f"To the second policy they are worth {self.effective_samples:.2f} of their number")
            found.append("This holds if no update between was trained on them")
        return [f"{sentence}." for sentence in found]

    def text(self) -> str:
        """The sentences and the tables, at most 80 columns wide."""
        data, of = self.to_dict(), ("prompts", f"w_{self.k}", "of |A_1|", f"of |A_{self.k}|")
        at_k, groups, changes = data["at_k"], data["groups"], self.effective_samples is not None
        weights = ["1" if at["k"] == 1 else with_interval(at["mean_weight"], 2) for at in at_k]
        told = told_apart([prompt["text"] for prompt in data["prompts"]])
        most = [one for one in sorted(zip(data["prompts"], told, strict=True), key=_most) if one[0]["share_k"] > 0]
        tables: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]] = [
            (
                "pass@k and mean weight",
                ("k", "pass@k", "E[w_k]", *["change of pass@k"] * changes),
                [
                    (str(at["k"]), with_interval(at["pass_rate"]), weight, *_one(at["change"]))
                    for at, weight in zip(at_k, weights, strict=True)
                ],
            ),
            (
                "Solve rates",
                ("solved", *of),
                [_part(one, value(one["mean_weight"], 2)) for one in data["solve_rates"]],
            ),
            ("Groups", ("group", *of), [_part(one, with_interval(one["mean_weight"], 2)) for one in groups]),
            (
                "Change by group",
                ("group", "pass@1", f"pass@{self.k}"),
                [(_name(one), *_one(one["change"]), *_one(one["change_k"])) for one in groups if changes],
            ),
            (
                "Change of pass@1 by solve rate",
                ("solved", "share", "change"),
                [
                    (f"{one['low']:.2g} to {one['high']:.2g}", f"{one['share']:.0%}", with_interval(one["change"]))
                    for one in data["change_by_solve_rate"]
                ],
            ),
            (
                f"Prompts that pass@{self.k} would train on most",
                ("prompt", "right", f"w_{self.k}", f"of |A_{self.k}|", *["change"] * changes),
                [
                    (excerpt(plain_text(text), 28), f"{p['num_correct']}/{p['num_samples']}")
                    + (with_interval(p["weight"], 2), f"{p['share_k']:.1%}")
                    + ((write_number(p["change"], 0.001),) if changes else ())
                    for p, text in most[:_SHOWN]
                ],
            ),
        ]
        lines = [fill(self.verdict, 80), fill(" ".join(self.about()), 80)]
        for title, columns, rows in tables:
            lines += ["", title, *(f"  {line}" for line in aligned([columns, *rows]))] if rows else []
        return "\n".join(lines)

    def save_to(self, folder: str | Path, *, force: bool = False) -> tuple[Path, Path]:
        """Write `rollouts.json` and `rollouts.html` into a folder.

        Raises:
            GuardError: other files of these names are there and `force` is not set, or plotly is not installed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        data, page = folder / JSON_NAME, folder / PAGE_NAME
        if data.exists() and not page.exists() and not force:
            raise GuardError(f"{data} exists without a page beside it: choose another folder, or --force (force=True).")
        self.save(page, force=force)
        write_whole(data, self.to_json())
        return data, page


def _moved(name: str, change: Mapping[str, Any]) -> str:
    if change["value"] is None or change["low"] is None or change["low"] <= 0 <= change["high"]:
        return f"the change of {name} is not established, {with_interval(change)}"
    return f"{name} {'rose' if change['value'] > 0 else 'fell'}, {with_interval(change)}"


def _one(number: Mapping[str, Any] | None) -> tuple[str, ...]:
    return () if number is None else (with_interval(number),)


def _name(part: Mapping[str, Any]) -> str:
    return excerpt(plain_text(part["name"]), 24)


def _part(part: Mapping[str, Any], weight: str) -> tuple[str, ...]:
    shares = (with_interval(part[name], 2) for name in ("share_1", "share_k"))
    return _name(part), str(part["num_prompts"]), weight, *shares


def _most(prompt: tuple[Mapping[str, Any], str]) -> float:
    return -prompt[0]["share_k"]
