"""`passk-guard plan`: the journal of a run in, what its probe can see out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from passk_guard.planning.inputs import read_past
from passk_guard.planning.plan import PROMPTS, make_plan
from passk_guard.planning.summary import describe_plan


def add_parser(subparsers: Any) -> None:
    """Add `plan` to an `argparse` subparsers object; its `func` default is `run`."""
    parser = subparsers.add_parser(
        "plan",
        help="how many prompts and refreshes it takes to see a conflict",
        description="From the noise in `passk_guard.jsonl`: within how many refreshes a conflict of a given size would "
        "be called, on a probe of this and of other sizes, and the cost of each. Also while the run goes on. From "
        "`analysis.json` for a run with the guard's defaults, without cost.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="output folder of a guarded run, or of analyze")
    parser.add_argument("--cosine", type=float, help="of the conflict; default: 0.2 below the run's threshold")
    parser.add_argument("--power", type=float, default=0.9, help="chance that it is called; default: 0.9")
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=list(PROMPTS), metavar="M", help="sizes of probe to look at"
    )
    parser.add_argument("--last", type=int, metavar="R", help="plan from the R newest refreshes; all by default")
    parser.add_argument("--json", action="store_true", help="the same for a program")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Plan and print.

    Returns:
        0.

    Raises:
        GuardError: nothing to plan from, or numbers outside their range; says what to do.
    """
    past = read_past(args.run_dir, args.last)
    plan = make_plan(
        past.noise, past.config, cosine=args.cosine, power=args.power, prompts=args.prompts, cost=past.cost
    )
    if args.json:
        print(json.dumps(plan.to_dict(), indent=2))
        return 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a sign still gets the table
    for line in describe_plan(plan, past.where):
        print(line)
    return 0
