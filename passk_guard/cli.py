"""`passk-guard`: analyse a checkpoint, compare two, screen prompts, report a run, plan its probe, check settings.

Each command imports what it needs when it runs: `--help` loads neither torch nor transformers nor pydantic. The
defaults of `analyze` are those of `analysis.Settings` and those of `compare` are the function's, which tests check.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version as installed_version
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import one_line

_LOWER, _NO_ANSWER = 1, 2  # of `compare`: a gate tells a loss from an error
_INTERRUPTED, _NO_READER = 130, 141  # as a shell reports SIGINT and SIGPIPE
_FILES = ("model", "probe", "correct", "out", "force", "adapter", "base", "progress", "as_json", "context", "rollouts")
_OF_ROLLOUTS = ("rollouts", "columns", "out", "force", "cluster_by", "correct_threshold", "ks", "confidence", "as_json")
_COMPARED = ("a", "b", "correct", "format", "as_json", "out", "force")
Option, Argument = typer.Option, typer.Argument

# Options of `analyze` and `compare`.
_CORRECT = "The reward function that means correct, in TRL's signature, imported from the current directory."
Correct = Annotated[str, Option(metavar="MODULE:FUNCTION", help=_CORRECT)]
Base = Annotated[Path | None, Option(metavar="DIR", help="Base of a PEFT adapter given as a model.")]
Progress = Annotated[
    bool | None, Option("--progress/--no-progress", help="Progress bars; by default in a terminal only.")
]
Temperature = Annotated[float, Option(help="Of the softmax.")]
MaxNewTokens = Annotated[int, Option(help="Longest completion.")]
BatchSize = Annotated[int, Option(help="Completions generated at once.")]
Seed = Annotated[int, Option(help="Of the choice of prompts, the completions, and the sketch or the bootstrap.")]
CorrectThreshold = Annotated[float, Option(help="Rewards at or above it are correct.")]
AsJson = Annotated[bool, Option("--json", help="The result as JSON, for a program.")]
_PROBE = "JSONL: on each line a `prompt` and the verifier's columns."
_LIMIT = "Prompts sampled at random from the probe; all by default."

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0; 1 after a user's error, which is one line on standard error; 2 for wrong usage; 130 after
        Ctrl-C; 141 if the reader of the output has gone. `compare` leaves with 1 where pass@1 is lower and with 2 after
        an error.
    """
    arguments = _one_value(list(sys.argv[1:] if argv is None else argv))
    try:
        _parser()(args=arguments, prog_name="passk-guard")
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@functools.cache
def _parser() -> Callable[..., Any]:
    return typer.main.get_command(app)


def _one_value(arguments: list[str]) -> list[str]:
    """`plan RUN_DIR --prompts 32 64` as typer takes it, `--prompts 32,64`, and likewise `--columns a=b c=d`."""
    if "--columns" in arguments:
        start = arguments.index("--columns") + 1
        names = list(takewhile(lambda one: "=" in one and not one.startswith("-"), arguments[start:]))
        arguments[start : start + len(names)] = [",".join(names)] if names else []
    if arguments[:1] == ["plan"] and "--prompts" in arguments:
        start = arguments.index("--prompts") + 1
        sizes = list(takewhile(str.isdigit, arguments[start:]))
        if len(sizes) > 1:
            arguments[start : start + len(sizes)] = [",".join(sizes)]
    return arguments


def _command(run: Callable[..., int]) -> Callable[..., int]:
    """Register a command whose errors become a line on standard error and an exit status."""

    @functools.wraps(run)
    def with_status(*args: Any, **options: Any) -> None:
        try:
            status = run(*args, **options)
        except BrokenPipeError:
            # Python would complain about the missing reader once more when it closes the stream.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = _NO_READER
        except (GuardError, OSError) as error:
            status = _complain(str(error))
        except KeyboardInterrupt:
            print("passk-guard: interrupted", file=sys.stderr)
            status = _INTERRUPTED
        raise typer.Exit(status)

    app.command()(with_status)
    return run


def _complain(text: str) -> int:
    print(f"passk-guard: error: {one_line(text)}", file=sys.stderr)
    return 1


def _print_version(wanted: bool) -> None:
    if wanted:
        print("passk-guard", installed_version("passk-guard"))
        raise typer.Exit


def _whole_numbers(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected whole numbers such as 1,2,4,8; found {text!r}") from None


def _pairs(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and column for name, _, column in pairs):
        raise typer.BadParameter(f"expected names and columns such as prompt=input correct=score; found {text!r}")
    return {name: column for name, _, column in pairs}


@app.callback()
def _program(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Is a pass@k step bought with pass@1?"""


@_command
def analyze(
    context: typer.Context,
    model: Annotated[Path | None, Argument(metavar="MODEL_DIR", help="A local model, or a PEFT adapter.")] = None,
    probe: Annotated[Path | None, Option(metavar="FILE", help=_PROBE)] = None,
    correct: Annotated[str | None, Option(metavar="MODULE:FUNCTION", help=_CORRECT)] = None,
    out: Annotated[Path | None, Option(metavar="DIR", help="Where samples and results go.")] = None,
    rollouts: Annotated[
        Path | None,
        Option(metavar="FILE", help="Rollouts that were dumped, JSON lines or parquet, in place of a model."),
    ] = None,
    columns: Annotated[
        str | None,
        Option(callback=_pairs, metavar="NAME=COLUMN ...", help="Their columns, such as prompt=input correct=score."),
    ] = None,
    force: Annotated[bool, Option("--force", help="Write into DIR although it holds other content.")] = False,
    adapter: Annotated[Path | None, Option(metavar="DIR", help="A PEFT adapter to put on MODEL_DIR.")] = None,
    base: Base = None,
    progress: Progress = None,
    num_samples: Annotated[int, Option("--samples", help="Completions of each prompt.")] = 32,
    prompts: Annotated[int | None, Option(metavar="M", help=_LIMIT)] = None,
    cluster_by: Annotated[
        str | None, Option(metavar="COLUMN", help="Column whose prompts of one value are not independent.")
    ] = None,
    temperature: Temperature = 1.0,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    correct_threshold: CorrectThreshold = 1.0,
    ks: Annotated[
        str, Option("--k", callback=_whole_numbers, metavar="K,K,...", help="Comma-separated, each at most --samples.")
    ] = "1,2,4,8,16",
    threshold: Annotated[float, Option(help="Cosine below which there is a conflict.")] = 0.0,
    confidence: Annotated[float, Option(help="Of intervals and verdicts.")] = 0.95,
    gamma: Annotated[float, Option(help="Cosine that the prediction for `project` assumes.")] = 0.2,
    floor_gamma: Annotated[float, Option(help="Cosine that the predicted floor is solved for.")] = 0.2,
    last_layer: Annotated[bool, Option("--last-layer", help="Gradients of the last hidden layer alone.")] = False,
    sketch_method: Annotated[Literal["kronecker", "countsketch"], Option(help="Of the gradients.")] = "kronecker",
    sketch_dim: Annotated[int, Option(help="Of the sketched gradients.")] = 16384,
    max_tokens: Annotated[int | None, Option(help="In a pass of the sketch; by default by free memory.")] = None,
    as_json: AsJson = False,
) -> int:
    """Measure what pass@k training would do to a checkpoint.

    Sample a probe from a local model, and measure whether its pass@k gradient conflicts with its pass@1 gradient, for
    which k, and which prompts cause it. Nothing is trained and nothing is downloaded. After Ctrl-C the same command
    continues. `accelerate launch` shares the prompts over processes.

    With --rollouts no model is needed: pass@k with intervals, whom pass@k would train on, and, with the
    log-probabilities of two policies, what the updates between them did. --out is optional then.
    """
    given = dict(locals())
    asked = [name for name in given if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if rollouts is not None:
        if foreign := [name for name in asked if name not in _OF_ROLLOUTS]:
            raise typer.BadParameter(f"{_spelled(foreign[0])} has no use with --rollouts")
        options = {name: given[name] for name in ("columns", "cluster_by", "correct_threshold", "confidence")}
        return _analyze_rollouts(rollouts, out, force, as_json, options | {"ks": ks if "ks" in asked else None})
    if columns is not None:
        raise typer.BadParameter("--columns names those of --rollouts, which is missing")
    if model is None or probe is None or correct is None or out is None:
        lacking = next(name for name in ("model", "probe", "correct", "out") if given[name] is None)
        raise typer.BadParameter(f"{_spelled(lacking)} is missing; or pass --rollouts FILE")
    settings = {name: value for name, value in given.items() if name not in (*_FILES, "columns")}
    from passk_guard.analysis.store import ROLLOUTS_NAME

    try:
        parts = {"adapter": adapter, "base": base}
        _analyze(model, probe, correct, out, parts, force, progress, settings, as_json)
    except KeyboardInterrupt:
        kept = out / ROLLOUTS_NAME
        print(f"\nStopped. Completions are kept in {kept}; the same command goes on from there.", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _spelled(name: str) -> str:
    return {"model": "MODEL_DIR", "num_samples": "--samples"}.get(name, f"--{name.replace('_', '-')}")


def _analyze_rollouts(path: Path, out: Path | None, force: bool, as_json: bool, options: dict[str, Any]) -> int:
    from passk_guard.analysis.rollouts import analyze_rollouts

    found = analyze_rollouts(path, **options)
    written = () if out is None else found.save_to(out, force=force)
    if as_json:
        print(found.to_json(), end="")
        return 0
    _accept_any_terminal()
    print(found.text())
    if written:
        print(f"\nWritten: {written[0]} and {written[1]}")
    return 0


def _analyze(
    model_dir: Path,
    probe_file: Path,
    correct: str,
    out: Path,
    parts: Any,
    force: bool,
    progress: Any,
    settings: Any,
    as_json: bool,
) -> None:
    import torch
    from accelerate import PartialState
    from transformers.utils import logging

    from passk_guard.analysis import Settings
    from passk_guard.analysis import analyze as analyze_model
    from passk_guard.analysis.load import import_function, load_model, load_tokenizer
    from passk_guard.analysis.run import choose_prompts
    from passk_guard.analysis.store import JSON_NAME, PAGE_NAME
    from passk_guard.analysis.words import print_analysis
    from passk_guard.probe.prompts import ProbeSet
    from passk_guard.probe.verifier import resolve_verifier
    from passk_guard.reporting.html.page import packed_plotly

    packed_plotly()  # refused now and not after hours of sampling
    checked = Settings(**settings)
    verifier = resolve_verifier(import_function(correct), threshold=checked.correct_threshold)
    probe = ProbeSet.of(probe_file)
    choose_prompts(probe, verifier, checked)  # refused now and not after a large model is loaded
    state = PartialState(cpu=not torch.accelerator.is_available())  # also starts the process group, where there is one
    model, tokenizer = load_model(model_dir, **parts), load_tokenizer(model_dir, **parts)
    logging.set_verbosity_error()  # transformers would repeat a remark about minimal lengths with every batch
    analysis = analyze_model(
        model.to(state.device),
        tokenizer,
        probe,
        verifier,
        out=out,
        force=force,
        progress=progress,
        name=" + ".join(str(path) for path in (model_dir, parts["adapter"]) if path),
        **settings,
    )
    if state.is_main_process:
        analysis.save(out, force=force)
        if as_json:
            print((out / JSON_NAME).read_text(encoding="utf-8"), end="")
        else:
            _accept_any_terminal()
            print_analysis(analysis)
            print(f"Written: {out / JSON_NAME} and {out / PAGE_NAME}")
    state.wait_for_everyone()
    if state.num_processes > 1:
        state.destroy_process_group()


@_command
def compare(
    a: Annotated[Path, Argument(metavar="A", help="A local model or a PEFT adapter, e.g. a run's start.")],
    b: Annotated[Path, Argument(metavar="B", help="The same, e.g. the run's end.")],
    probe: Annotated[Path, Option("--prompts", "--probe", metavar="FILE", help=_PROBE)],
    correct: Correct,
    base: Base = None,
    progress: Progress = None,
    num_samples: Annotated[int, Option("--num-samples", "--samples", help="Completions of each prompt.")] = 16,
    prompts: Annotated[int | None, Option("--limit", metavar="M", help=_LIMIT)] = None,
    temperature: Temperature = 1.0,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    correct_threshold: CorrectThreshold = 1.0,
    ks: Annotated[
        str | None,
        Option("--k", callback=_whole_numbers, metavar="K,K,...", help="Each at most --num-samples; all by default."),
    ] = None,
    confidence: Annotated[float, Option(help="Of the band and of the verdict on pass@1.")] = 0.95,
    tolerance: Annotated[float, Option(help="Loss of pass@1 that is accepted.")] = 0.0,
    format: Annotated[Literal["text", "json", "markdown"], Option(help="Of the output.")] = "text",
    out: Annotated[Path | None, Option(metavar="FILE", help="Also write a page.")] = None,
    force: Annotated[bool, Option("--force", help="Write over a file that is not a comparison.")] = False,
    as_json: Annotated[bool, Option("--json", help="Short for --format json.")] = False,
) -> int:
    """Compare pass@k of two checkpoints, as a gate.

    The same prompts and seeds for both, and a band of B - A that covers all k together. Leave with 1 where pass@1 of B
    is established to be lower than that of A by more than --tolerance, with 0 where it is not, with 2 after an error.
    """
    options = {name: value for name, value in dict(locals()).items() if name not in _COMPARED}
    from passk_guard.reporting.html.page import packed_plotly

    try:
        if out is not None:
            packed_plotly()  # refused now and not after both checkpoints were sampled
        found, first = _compare(a, b, correct, options)
        if first:
            _accept_any_terminal()
            print(
                {"text": found.text, "markdown": found.markdown, "json": found.to_json}["json" if as_json else format]()
            )
        if first and out is not None:
            found.save(out, force=force)
    except (GuardError, OSError) as error:
        _complain(str(error))
        return _NO_ANSWER
    except Exception:  # Python would leave with 1, as after a loss
        traceback.print_exc()
        return _NO_ANSWER
    return _LOWER if found.established_lower else 0


def _compare(a: Path, b: Path, correct: str, options: dict[str, Any]) -> tuple[Any, bool]:
    """The `Comparison`, and whether this process is the one that prints."""
    import torch
    from accelerate import PartialState
    from transformers.utils import logging

    from passk_guard.analysis.compare import compare as compare_models
    from passk_guard.analysis.load import import_function

    function = import_function(correct)
    state = PartialState(cpu=not torch.accelerator.is_available())
    logging.set_verbosity_error()
    found = compare_models(a, b, options.pop("probe"), function, **options)
    state.wait_for_everyone()
    if state.num_processes > 1:
        state.destroy_process_group()
    return found, state.is_main_process


def _accept_any_terminal() -> None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a sign still gets the table


@_command
def screen(
    model: Annotated[Path, Argument(metavar="MODEL_DIR", help="A local model, or a PEFT adapter.")],
    probe: Annotated[Path, Option("--prompts", "--probe", metavar="FILE", help=_PROBE)],
    correct: Correct,
    out: Annotated[Path, Option(metavar="FILE", help="JSONL of the kept prompts.")],
    force: Annotated[bool, Option("--force", help="Replace FILE.")] = False,
    base: Base = None,
    progress: Progress = None,
    num_samples: Annotated[int, Option("--samples", help="Completions of each prompt.")] = 4,
    prompts: Annotated[int | None, Option("--limit", metavar="M", help=_LIMIT)] = None,
    temperature: Temperature = 1.0,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    correct_threshold: CorrectThreshold = 1.0,
    as_json: AsJson = False,
) -> int:
    """Keep the prompts that a model solves sometimes.

    A few samples of many prompts, before a probe is chosen: a prompt that is always or never solved says nothing about
    the gradients. Estimates from the kept prompts speak for prompts like these.
    """
    settings = {name: value for name, value in dict(locals()).items() if name not in _FILES}
    import torch
    from accelerate import PartialState
    from transformers.utils import logging

    from passk_guard.analysis.load import import_function, load_model, load_tokenizer
    from passk_guard.analysis.screen import refuse_existing
    from passk_guard.analysis.screen import screen as screen_prompts

    refuse_existing(out, force=force)
    function = import_function(correct)
    state = PartialState(cpu=not torch.accelerator.is_available())
    on, tokenizer = load_model(model, base=base).to(state.device), load_tokenizer(model, base=base)
    logging.set_verbosity_error()
    found = screen_prompts(on, tokenizer, probe, function, progress=progress, **settings)
    if state.is_main_process:
        found.save(out, force=force)
        print(json.dumps({"file": str(out), **found.to_dict()}) if as_json else f"{found.text}\nWritten: {out}")
    state.wait_for_everyone()
    if state.num_processes > 1:
        state.destroy_process_group()
    return 0


@_command
def report(
    run_dirs: Annotated[list[Path], Argument(metavar="RUN_DIR...", help="Output folders of guarded runs.")],
    out: Annotated[Path | None, Option(metavar="FILE", help="Default: passk_guard.html in the first RUN_DIR.")] = None,
    force: Annotated[bool, Option("--force", help="Write over a file that is not a report.")] = False,
    as_json: AsJson = False,
) -> int:
    """Make a page from the journal of a run, or of several to compare.

    One self-contained HTML page from `passk_guard.jsonl`, also while the run goes on.
    """
    from passk_guard.reporting.run_report import PAGE_NAME
    from passk_guard.reporting.run_report import report as report_of

    found = report_of(*run_dirs)
    path = found.save(out or found.journals[0].path.with_name(PAGE_NAME), force=force)
    for journal in found.journals:
        if journal.unfinished:
            print(f"{journal.path}: the last line is half written and was left out", file=sys.stderr)
    print(json.dumps({"page": str(path), "journals": [str(j.path) for j in found.journals]}) if as_json else path)
    return 0


@_command
def plan(
    run_dir: Annotated[Path, Argument(metavar="RUN_DIR", help="Output folder of a guarded run, or of analyze.")],
    cosine: Annotated[
        float | None, Option(help="Of the conflict; default: 0.2 below the run's threshold.", show_default=False)
    ] = None,
    power: Annotated[float, Option(help="Chance that the conflict is called.")] = 0.9,
    prompts: Annotated[
        str, Option(callback=_whole_numbers, metavar="M,M,...", help="Sizes of probe to plan for.")
    ] = "32,64,128,256,512",
    last: Annotated[int | None, Option(metavar="R", help="Plan from the R newest refreshes; all by default.")] = None,
    as_json: AsJson = False,
) -> int:
    """Find how many prompts and refreshes it takes to see a conflict.

    From the noise in `passk_guard.jsonl`: within how many refreshes a conflict of a given size would be called, on a
    probe of this and of other sizes, and the cost of each. Also while the run goes on. From `analysis.json` for a run
    with the guard's defaults, without cost.
    """
    from passk_guard.planning.inputs import read_past
    from passk_guard.planning.plan import make_plan
    from passk_guard.planning.summary import describe_plan

    sizes: Any = prompts  # the callback has made numbers of the text
    past = read_past(run_dir, last)
    found = make_plan(past.noise, past.config, cosine=cosine, power=power, prompts=sizes, cost=past.cost)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return 0
    _accept_any_terminal()
    for line in describe_plan(found, past.where):
        print(line)
    return 0


@_command
def check(
    config: Annotated[
        Path, Argument(metavar="CONFIG", help="Settings as YAML or JSON, or a file with them under `passk_guard:`.")
    ],
    as_json: AsJson = False,
) -> int:
    """Validate a YAML or JSON file of settings."""
    from passk_guard.config import config_problems

    problems = config_problems(config)
    if as_json:
        print(json.dumps({"config": str(config), "valid": not problems, "problems": problems}, indent=2))
        return 1 if problems else 0
    for problem in problems:
        _complain(f"{config}: {problem}")
    if not problems:
        print(f"{config}: valid")
    return 1 if problems else 0


@_command
def schema() -> int:
    """Print the JSON schema of the guard's settings."""
    from passk_guard.config import config_schema

    print(json.dumps(config_schema(), indent=2))
    return 0


@_command
def demo(
    out: Annotated[Path, Option(metavar="DIR", help="Where results are written.")] = Path("runs/demo"),
    cache: Annotated[Path, Option(metavar="DIR", help="Where warm starts are kept.")] = Path("runs/warm_start"),
    seeds: Annotated[str, Option(callback=_whole_numbers, metavar="S,S,...", help="One run for each.")] = "0",
    as_json: AsJson = False,
) -> int:
    """Train a small model, observed and guarded, and check the claim: eight minutes of a CPU.

    GRPO on pass@8 loses pass@1, the guard reports it, and with `mitigation="project"` pass@1 is kept. Leave with 1
    where a run does not show that. It needs the extra `demo`; nothing is downloaded.
    """
    numbers: Any = seeds  # the callback has made numbers of the text
    try:
        run_demo = _demo()
    except ModuleNotFoundError as error:
        raise GuardError(
            f"Expected the libraries of the demo; found no module {error.name!r}. pip install 'passk-guard[demo]'"
        ) from None
    arguments = ["--out", str(out), "--cache", str(cache), "--seeds", *map(str, numbers), *["--json"] * as_json]
    return run_demo(arguments, "passk-guard demo")


def _demo() -> Callable[[Sequence[str], str], int]:
    """From the wheel, or from the checkout that this package is in."""
    root = Path(__file__).parents[1]
    if (root / "examples" / "interference").is_dir():
        sys.path.append(str(root))
        from examples.interference.demo import main as run

        return run
    from passk_guard._demo.demo import main as run_installed

    return run_installed
