"""`passk-guard`: analyse a checkpoint, report a run, plan its probe, check settings."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import one_line

_INTERRUPTED, _NO_READER = 130, 141  # as a shell reports SIGINT and SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Returns:
        0; 1 after an error of the user's, which stands in one line on standard error; 130 after Ctrl-C. Wrong usage
        leaves with 2, as argparse does.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(arguments).parse_args(arguments)
        return int(args.func(args))
    except GuardError as error:
        return _complain(str(error))
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NO_READER
    except OSError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        print("passk-guard: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="passk-guard", description="Is a pass@k step bought with pass@1?")
    parser.add_argument("--version", action="version", version=f"passk-guard {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_analyze(commands, arguments)
    _add_report(commands)
    _add_plan(commands, arguments)
    schema = commands.add_parser("schema", help="print the JSON schema of the guard's settings")
    schema.set_defaults(func=_schema)
    check = commands.add_parser("check", help="validate a YAML or JSON file of settings")
    check.add_argument("config", type=Path, metavar="CONFIG", help="settings, or a file with them under `passk_guard:`")
    check.set_defaults(func=_check)
    return parser


def _add_analyze(commands: Any, arguments: Sequence[str]) -> None:
    """The real parser only where it is asked for: it imports transformers, which takes seconds."""
    if "analyze" not in arguments:
        commands.add_parser("analyze", help="measure what pass@k training would do to a checkpoint", add_help=False)
        return
    from passk_guard.analysis.command import add_parser

    add_parser(commands)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="a page from the journal of a run, or of two over each other",
        description="One self-contained HTML page from `passk_guard.jsonl`, also while the run goes on.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="output folder of a guarded run")
    parser.add_argument("other", type=Path, nargs="?", metavar="RUN_DIR_B", help="of a second one, to compare")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: passk_guard.html in RUN_DIR")
    parser.add_argument("--force", action="store_true", help="write over a file that is not a report")
    parser.set_defaults(func=_report)


def _add_plan(commands: Any, arguments: Sequence[str]) -> None:
    if "plan" not in arguments:
        commands.add_parser("plan", help="how many prompts and refreshes it takes to see a conflict", add_help=False)
        return
    from passk_guard.planning.command import add_parser

    add_parser(commands)


def _report(args: argparse.Namespace) -> int:
    from passk_guard.reporting.run_report import PAGE_NAME, report

    found = report(args.run_dir, args.other)
    out = args.out or found.journals[0].path.with_name(PAGE_NAME)
    path = found.save(out, force=args.force)
    for journal in found.journals:
        if journal.unfinished:
            print(f"{journal.path}: the last line is half written and was left out", file=sys.stderr)
    print(path)
    return 0


def _schema(args: argparse.Namespace) -> int:
    from passk_guard.config import config_schema

    print(json.dumps(config_schema(), indent=2))
    return 0


def _check(args: argparse.Namespace) -> int:
    from passk_guard.config import config_problems

    problems = config_problems(args.config)
    for problem in problems:
        _complain(f"{args.config}: {problem}")
    if not problems:
        print(f"{args.config}: valid")
    return 1 if problems else 0


def _complain(text: str) -> int:
    print(f"passk-guard: error: {one_line(text)}", file=sys.stderr)
    return 1


def _version() -> str:
    try:
        return version("passk-guard")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
