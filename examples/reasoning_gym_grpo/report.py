"""What the run has shown: a table of pass rates, the guard's verdicts, and both as JSON lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from examples.reasoning_gym_grpo.evaluation import change, groups, pass_rates
from examples.reasoning_gym_grpo.grpo import Plan
from examples.reasoning_gym_grpo.tasks import Row


@dataclass(frozen=True)
class Comparison:
    """Correct samples of each test prompt, [m], before and after each arm, and what the guard said in each.

    Attributes:
        before: of the warm start; after: arm -> counts; events: arm -> lines of the guard's journal.
    """

    plan: Plan
    rows: list[Row]
    before: Tensor
    after: dict[str, Tensor]
    events: dict[str, list[dict]]


def results(comparison: Comparison) -> list[dict]:
    """One record for each group of prompts, arm and k: rates with standard errors, and the paired change."""
    plan, n = comparison.plan, comparison.plan.test_samples
    records = []
    for group, members in groups(comparison.rows).items():
        for arm, after in comparison.after.items():
            for k in (1, plan.k):
                values = {
                    "before": pass_rates(comparison.before, n, k, members),
                    "after": pass_rates(after, n, k, members),
                    "change": change(comparison.before, after, n, k, members),
                }
                record = {"event": "rates", "group": group, "prompts": int(members.sum()), "arm": arm, "k": k}
                records.append(record | {name: {"mean": r.mean, "se": r.se} for name, r in values.items()})
    return records


def write_results(path: Path, comparison: Comparison, seed: int) -> None:
    """`results`, then the guard's changes of verdict, one JSON object a line."""
    verdicts = [
        {**event, "event": "verdict", "arm": arm}
        for arm, events in comparison.events.items()
        for event in events
        if event["event"] == "state"
    ]
    lines = [{"seed": seed, **record} for record in [*results(comparison), *verdicts]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def print_table(console: Console, comparison: Comparison, seed: int) -> None:
    """Rates of the warm start and their change in each arm, for pass@1 and pass@k, all with standard errors."""
    plan = comparison.plan
    size = f"{len(comparison.rows)} held-out prompts x {plan.test_samples} samples"
    table = Table("", "task", title=f"seed {seed}: {size}, ± standard error over prompts", title_justify="left")
    for column in ("warm start", *(f"{arm}, change" for arm in comparison.after)):
        table.add_column(column, justify="right")
    records = results(comparison)
    for k in (1, plan.k):
        mine = [record for record in records if record["k"] == k]
        for group in dict.fromkeys(record["group"] for record in mine):
            arms = [record for record in mine if record["group"] == group]
            cells = [_rate(arms[0]["before"]), *(_rate(record["change"], sign="+") for record in arms)]
            table.add_row(f"pass@{k}" if group == "all" else "", group, *cells)
        table.add_section()
    console.print(table)


def print_verdicts(console: Console, comparison: Comparison) -> None:
    """What the guard said in each arm, and how many steps it turned."""
    for arm, events in comparison.events.items():
        looks = [event for event in events if event["event"] == "refresh"]
        cosines = sum(event["cosine"] is not None for event in looks)
        changes = [f"{event['to']} from step {event['step']}" for event in events if event["event"] == "state"]
        turned = sum((event.get("mitigated") or 0) > 0 for event in events if event["event"] == "steps")
        console.print(
            f"{arm}: {len(looks)} refreshes ({cosines} with a cosine), {turned} of {comparison.plan.steps} steps "
            f"turned; verdict: {', '.join(['undetermined', *changes])}",
            soft_wrap=True,
        )


def _rate(rate: dict[str, float], sign: str = "") -> str:
    return f"{rate['mean']:{sign}.3f} ± {rate['se']:.3f}"
