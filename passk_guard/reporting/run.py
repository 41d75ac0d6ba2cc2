"""What the journal of a run says: its columns, its verdicts, and the whole in a sentence."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from passk_guard.change import missed_in_words
from passk_guard.reporting.html.text import is_number
from passk_guard.reporting.journal import Event, RunJournal

RECOMMENDED = "mitigation='hold' or 'project'"  # hold where the trainer computes advantages
VERDICTS = ("conflict", "clear", "undetermined")
FAILED = "failed refresh"
NO_REFRESH = "NO VALID REFRESH"
Column = list[float | None]
Interval = tuple[float, float, float]
"""Value, lower end, upper end."""


@dataclass(frozen=True)
class Run:
    """A journal with the name it has on the page."""

    name: str
    journal: RunJournal

    @property
    def refreshes(self) -> list[Event]:
        """Refreshes that gave an estimate, and those that failed: a failed one is a gap in every curve."""
        return self.journal.of("refresh", "failed_refresh")

    @property
    def steps(self) -> list[int]:
        """Step of each of the refreshes."""
        return [event["step"] for event in self.refreshes]

    @property
    def ends(self) -> list[int]:
        """Step at the end of each of the windows."""
        return [event["step"] for event in self.windows]

    def column(self, name: str, kind: str = "refresh") -> Column:
        """A number of each of the refreshes, or of each of the windows of the realised change (kind "change")."""
        return [number(event.get(name)) for event in (self.windows if kind == "change" else self.refreshes)]

    def columns(self, name: str, *kinds: str) -> tuple[list[int], Column]:
        """Steps and values of a number that events of these kinds may hold."""
        events = [event for event in self.journal.of(*kinds) if name in event]
        return [event["step"] for event in events], [number(event[name]) for event in events]

    @property
    def failed(self) -> list[Event]:
        """Refreshes without an estimate."""
        return self.journal.of("failed_refresh")

    @property
    def held_out(self) -> bool:
        """Whether the numbers describe held-out prompts."""
        return all(event.get("held_out", True) for event in self.journal.of("refresh"))

    @property
    def confidence(self) -> float:
        """Of the intervals."""
        found = next(iter(self.numbers("confidence")), 0.95)
        return found if 0 < found < 1 else 0.95

    @property
    def threshold(self) -> float:
        """Cosine below which there is a conflict; journals without one are of runs with the default."""
        return next(iter(self.numbers("threshold")), number(self.journal.settings.get("threshold")) or 0.0)

    @property
    def ks(self) -> list[int]:
        """Every k > 1 with a pass rate in the journal."""
        names = {name for event in self.journal.of("refresh") for name in event}
        found = {int(match[1]) for name in names if (match := re.fullmatch(r"pass_at_(\d{1,6})", name))}
        return sorted(found - {1})

    def numbers(self, name: str, kind: str = "refresh") -> list[float]:
        """The numbers of this name in events of this kind, those that are not determined left out, oldest first."""
        return [v for event in self.journal.of(kind) if (v := number(event.get(name))) is not None]

    @property
    def alerts(self) -> list[tuple[int, str, str]]:
        """Those of `changes` that raised an alert."""
        return [change for change in self.changes if change[1] in ("CONFLICT", "LOSING", NO_REFRESH)]

    @property
    def changes(self) -> list[tuple[int, str, str]]:
        """(step, kind, text) of each change of a verdict, and of failed refreshes in a row."""
        after = number(self.journal.settings.get("failed_refresh_alert")) or 3  # the default of GuardConfig
        failed = [e for e in self.failed if e.get("alert", e.get("streak") == after)]
        changes = [
            (e["step"], str(e.get("to", "?")).upper(), e.get("message") or "")
            for e in self.journal.of("state", "outcome")
        ]
        return sorted(changes + [(e["step"], NO_REFRESH, e.get("reason") or "") for e in failed])

    @property
    def windows(self) -> list[Event]:
        """The windows of the realised change."""
        return self.journal.of("change")

    def movers(self, kind: str, most: int = 10) -> list[tuple[int, str, float]]:
        """(step, prompt, change of p) of the prompts that "lost" or "gained" most in any window."""
        found = []
        for event in self.windows:
            pairs = event.get(kind)
            for pair in pairs if isinstance(pairs, list) else []:
                if isinstance(pair, list) and len(pair) == 2 and (change := number(pair[1])) is not None:
                    found.append((event["step"], str(pair[0]), change))
        return sorted(found, key=lambda one: -abs(one[2]))[:most]

    @property
    def by_group(self) -> dict[str, list[float]]:
        """Change of pass@1 from the start to the end of each window: of hard, medium and easy prompts, and of groups.

        The first three are parts of the whole: their sum is its change. A group's is its mean.
        """
        found: dict[str, list[float]] = {"hard": [], "medium": [], "easy": []}
        for i, event in enumerate(self.windows):
            rates, groups = event.get("solve_rates"), event.get("groups")
            parts: dict[str, Any] = dict(zip(found, rates if isinstance(rates, list) else [], strict=False))
            parts |= {f"group {name}": group for name, group in groups.items()} if isinstance(groups, dict) else {}
            for name in found | parts:
                totals, part = found.setdefault(name, [0.0] * i), parts.get(name)
                change = (number(part.get("pass_at_1")) or 0.0) if isinstance(part, dict) else 0.0
                totals.append((totals[-1] if totals else 0.0) + change)
        return found

    @property
    def spans(self) -> list[tuple[int, int, str]]:
        """(start, end, state) from each refresh to the next; the last one is as long as the one before."""
        steps = self.steps
        gap = steps[-1] - steps[-2] if len(steps) > 1 else 1
        ends = [*steps[1:], steps[-1] + gap] if steps else []
        return [(e["step"], end, state_of(e)) for e, end in zip(self.refreshes, ends, strict=True)]

    @property
    def outcomes(self) -> list[tuple[int, int, str]]:
        """(start, end, outcome) of each window of the realised change."""
        begin = [int(number(event.get("since")) or 0) for event in self.windows]
        return [(b, e["step"], str(e.get("outcome"))) for b, e in zip(begin, self.windows, strict=True)]

    def stood(self, state: str) -> tuple[int, int] | None:
        """First and last step at which a verdict or an outcome stood; None where it never did."""
        found = [event["step"] for event in self.refreshes if state_of(event) == state]
        found += [event["step"] for event in self.windows if event.get("outcome") == state]
        return (min(found), max(found)) if found else None

    @property
    def worst(self) -> str:
        """LOSING or CONFLICT where the run ever had one, else the verdict at its end."""
        verdicts = [verdict_of(event) for event in self.journal.of("refresh")] or ["undetermined"]
        return next((state for state in ("losing", "conflict") if self.stood(state)), verdicts[-1]).upper()

    def change(self, k: int) -> Interval | None:
        """Change of pass@k since the start: of the realised change, else between the first and the last measurement."""
        for event in reversed(self.windows):
            name = f"pass_at_{k}_total"
            found = [number(event.get(f"{name}{end}")) for end in ("", "_ci_low", "_ci_high")]
            if all(value is not None for value in found):
                return tuple(found)  # type: ignore[return-value]
        name = f"pass_at_{k}"
        pairs = zip(self.column(name), self.column(f"{name}_se"), strict=True)
        known = [(rate, error) for rate, error in pairs if rate is not None and error is not None]
        if len(known) < 2:
            return None
        value, reach = known[-1][0] - known[0][0], quantile(self.confidence) * math.hypot(known[0][1], known[-1][1])
        return value, value - reach, value + reach

    @property
    def headline(self) -> tuple[str, str]:
        """What happened and what to do, and its kind: "bad", "good" or ""."""
        moves = [_moved(f"pass@{k}", found) for k in (1, *self.ks) if (found := self.change(k)) is not None]
        if moves and (one := self.change(1)) and one[2] < 0:
            moves[0] += self._who_and_when()
        sentences = ["; ".join(moves) + missed_in_words(self.missed) + "."] if moves else []
        stands = [f"{s.upper()} {_from_to(*steps)}." for s in ("losing", "conflict") if (steps := self.stood(s))]
        if not stands:
            stands = ["CLEAR: no conflict." if self.worst == "CLEAR" else "UNDETERMINED: the probe cannot tell yet."]
        used = self.journal.settings.get("mitigation", "off")
        if self.worst in ("LOSING", "CONFLICT"):
            stands.append(f"Try {RECOMMENDED}." if used == "off" else f"With mitigation='{used}'.")
        kind = {"LOSING": "bad", "CONFLICT": "bad", "CLEAR": "good"}.get(self.worst, "")
        return " ".join(sentences + stands), kind

    def _who_and_when(self) -> str:
        last = {name: totals[-1] for name, totals in self.by_group.items() if totals and not name.startswith("group ")}
        worst = min(last, key=lambda name: last[name], default="")
        losses = -sum(min(total, 0.0) for total in last.values())
        who = f", mostly on {worst} prompts" if worst and -last[worst] > losses / 2 > 0 else ""
        highs = zip(self.windows, self.column("pass_at_1_total_ci_high", "change"), strict=True)
        since = next((event["step"] for event, high in highs if high is not None and high < 0), None)
        return who + (f", established from step {since} on" if since is not None else "")

    @property
    def missed(self) -> int:
        """Windows of the realised change that are missing in the totals."""
        return max((int(number(event.get("missed")) or 0) for event in self.windows), default=0)

    @property
    def cost(self) -> str:
        """Seconds of all refreshes, and the probe's share of the work of training."""
        seconds = self.numbers("probe_seconds")
        shares = self.numbers("probe_share", "change") + self.numbers("probe_share")
        share = f", {100 * shares[-1]:.3g}% of training's tokens" if shares else ""
        return f"{sum(seconds):.3g} s{share}" if seconds else "–"

    @property
    def csv(self) -> str:
        """Every number of every event, a row an event; no text of the run's."""
        plain = [
            {name: value for name, value in event.items() if number(value) is not None} | {"event": event["event"]}
            for event in self.journal.events
        ]
        names = list(dict.fromkeys(["event", "step", *(name for row in plain for name in row)]))
        file = io.StringIO()
        writer = csv.DictWriter(file, [name for name in names if re.fullmatch(r"\w+", name)], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(plain)
        return file.getvalue()


def number(value: Any) -> float | None:
    """The value where it is a finite number; None else: a journal is a file that anything may have written."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if is_number(value) else None


def verdict_of(event: Event) -> str:
    """The standing verdict after a refresh."""
    verdict = event.get("verdict")
    return verdict if verdict in VERDICTS else "undetermined"


def state_of(event: Event) -> str:
    """The verdict, or that the refresh failed."""
    return FAILED if event["event"] == "failed_refresh" else verdict_of(event)


def quantile(confidence: float) -> float:
    """Of the normal distribution, for a two-sided interval."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def interval_in_words(found: Interval | None) -> str:
    """`−0.08 [−0.11, −0.05]`, the interval kept on one line."""
    if found is None:
        return "–"
    value, low, high = (f"{x:+.2f}".replace("-", "−") for x in found)
    return f"{value} [{low},\u00a0{high}]"


def _moved(name: str, found: Interval) -> str:
    value, low, high = found
    if low <= 0 <= high:
        return f"{name} did not measurably change: {interval_in_words(found)}"
    ends = sorted((abs(low), abs(high)))
    return f"{name} {'rose' if value > 0 else 'fell'} by {abs(value):.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"


def _from_to(first: int, last: int) -> str:
    return f"at step {first}" if first == last else f"from step {first} to {last}"


def names_of(journals: Sequence[RunJournal]) -> list[str]:
    """The shortest ends of the folders' paths that tell the runs apart."""
    paths = [journal.path.parent.absolute().resolve().parts for journal in journals]
    depth = next((d for d in range(1, max(map(len, paths)) + 1) if len({p[-d:] for p in paths}) == len(paths)), 0)
    if not depth:  # a run given twice
        return [f"{path[-1]} ({i})" for i, path in enumerate(paths, 1)]
    return ["/".join(path[-depth:]) for path in paths]
