"""What a comparison of two checkpoints found, as a record, as text, as Markdown and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from passk_guard.analysis.page import COMPARISON_KIND, comparison_page
from passk_guard.analysis.words import aligned
from passk_guard.reporting.html.page import Paged
from passk_guard.utils.text import plain_text

VERSION = 1
Floats: TypeAlias = "tuple[float, ...]"
Prompts: TypeAlias = "tuple[tuple[str, float, float], ...]"
_COLUMNS = ("k", "A", "B", "B - A", "band", "standard error")


@dataclass(frozen=True)
class Comparison(Paged):
    """pass@k of checkpoint B less that of A, as means over prompts.

    Attributes:
        a, b: names of the checkpoints.
        ks: the k of pass@k, rising from 1.
        pass_a, pass_b: [K] unbiased pass@k of each.
        difference: [K] pass_b - pass_a. standard_error: [K] of each difference by itself, over prompts.
        low, high: [K] band that covers all K differences together at `confidence`.
        low_1, high_1: one-sided bounds of the difference of pass@1, each at `confidence`.
        established_lower: whether pass@1 of B is established to be lower by more than `tolerance`: `high_1` is below
            -`tolerance`.
        confidence, tolerance, seed: as given. num_samples: n of each prompt.
        num_prompts: prompts compared. left_out: those with fewer verdicts than the largest k from A or B.
        failures: samples on which the verifier raised, both checkpoints together.
        verifier: name of the function that means correct.
        lost, gained: text, p-hat of A and p-hat of B of the prompts whose p-hat fell and rose most, most first. The
            largest of many differences: a part of each is chance.
    """

    kind = COMPARISON_KIND
    a: str
    b: str
    ks: tuple[int, ...]
    pass_a: Floats
    pass_b: Floats
    difference: Floats
    standard_error: Floats = field(repr=False)
    low: Floats
    high: Floats
    low_1: float
    high_1: float
    established_lower: bool
    confidence: float
    tolerance: float
    seed: int
    num_samples: int
    num_prompts: int
    left_out: int
    failures: int
    verifier: str
    lost: Prompts = field(default=(), repr=False)
    gained: Prompts = field(default=(), repr=False)

    def text(self) -> str:
        """The verdict and a table of fixed width."""
        table = aligned([_COLUMNS, *self._rows()], str.rjust)
        return "\n".join([self.verdict, *self._about(), "", *table])

    def markdown(self) -> str:
        """The same for a pull request."""
        about = "  \n".join(_escaped(line) for line in self._about())
        rows = [_COLUMNS, ("---:",) * len(_COLUMNS), *self._rows()]
        table = ("| " + " | ".join(row) + " |" for row in rows)
        return "\n".join([f"**{self.verdict}**", "", about, "", *table])

    def to_json(self) -> str:
        """All fields as JSON text, with the `version` of the layout."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the `version` of the layout."""
        return {"version": VERSION} | asdict(self)

    @property
    def html(self) -> str:
        """The self-contained page."""
        return comparison_page(self)

    @property
    def verdict(self) -> str:
        """Whether pass@1 of B is lower, as a sentence with its bounds."""
        bounds = f"at least {self.low_1:+.3f} and at most {self.high_1:+.3f}, each at {100 * self.confidence:g}%"
        found = f"B - A = {self.difference[0]:+.3f}, {bounds}"
        beyond = f" by more than {self.tolerance:g}" if self.tolerance else ""
        if self.established_lower:
            return f"pass@1 of B is lower than that of A{beyond}: {found}."
        if self.low_1 >= -self.tolerance:
            return f"pass@1 of B is not lower than that of A{beyond}: {found}."
        return f"pass@1 of B is not established to be lower than that of A{beyond}, nor is it ruled out: {found}."

    def _about(self) -> list[str]:
        raised = f" The verifier raised on {self.failures} samples." if self.failures else ""
        return [
            f"A: {plain_text(self.a)}",
            f"B: {plain_text(self.b)}",
            f"{self.num_prompts} prompts x {self.num_samples} samples, {self.left_out} prompts left out. "
            f"The band covers all k together at {100 * self.confidence:g}%.{raised}",
        ]

    def _rows(self) -> list[tuple[str, ...]]:
        columns = (self.ks, self.pass_a, self.pass_b, self.difference, self.low, self.high, self.standard_error)
        return [
            (str(k), f"{a:.3f}", f"{b:.3f}", f"{d:+.3f}", f"[{low:+.3f}, {high:+.3f}]", _error(error))
            for k, a, b, d, low, high, error in zip(*columns, strict=True)
        ]


def _error(value: float) -> str:
    return f"{value:.3f}" if value else "no spread"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("`", "\\`")
