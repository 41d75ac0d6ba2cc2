"""`passk-guard analyze`: a checkpoint directory in, a report out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from passk_guard.analysis.analyze import analyze, drawn_probe
from passk_guard.analysis.load import import_function, load_model, load_tokenizer
from passk_guard.analysis.settings import Settings
from passk_guard.analysis.store import JSON_NAME, PAGE_NAME, ROLLOUTS_NAME
from passk_guard.analysis.terminal import print_analysis
from passk_guard.probe.prompts import ProbeSet
from passk_guard.probe.verifier import resolve_verifier

_DEFAULT = Settings()
_INTERRUPTED = 130  # as shells have it: 128 + SIGINT


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add `analyze` to an `argparse` subparsers object; its `func` default is `run`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "analyze",
        help="measure what pass@k training would do to a checkpoint",
        description="Sample a probe from a local model, and measure whether its pass@k gradient conflicts with its "
        "pass@1 gradient, for which k, and which prompts cause it. Nothing is trained and nothing downloaded. Stopped "
        "with Ctrl-C, the same command goes on where it was. `accelerate launch` shares the prompts over processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_what(parser)
    _add_sampling(parser)
    _add_measuring(parser)
    parser.set_defaults(func=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Analyse, print, and write `analysis.json` and `analysis.html`.

    Returns:
        0; 130 after Ctrl-C, with a line on standard error that says where the completions are.

    Raises:
        GuardError: misuse; says what to pass instead.
    """
    try:
        _run(args)
    except KeyboardInterrupt:
        kept = args.out / ROLLOUTS_NAME
        print(f"\nStopped. What was sampled is kept in {kept}; the same command goes on from there.", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _run(args: argparse.Namespace) -> None:
    given = {name: getattr(args, name) for name in Settings.__dataclass_fields__}
    settings = Settings(**given)
    correct = resolve_verifier(import_function(args.correct), threshold=settings.correct_threshold)
    probe = ProbeSet.of(args.probe)
    drawn_probe(probe, correct, settings)  # refused now and not after a large model is loaded
    state = _processes()
    model = load_model(args.model, adapter=args.adapter, base=args.base)
    tokenizer = load_tokenizer(args.model, adapter=args.adapter, base=args.base)
    _quieten()
    analysis = analyze(
        model.to(state.device),
        tokenizer,
        probe,
        correct,
        out=args.out,
        force=args.force,
        progress=args.progress,
        name=" + ".join(filter(None, [str(args.model), args.adapter and str(args.adapter)])),
        **given,
    )
    if state.is_main_process:
        analysis.save(args.out, force=args.force)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a sign still gets the table
        print_analysis(analysis)
        print(f"Written: {args.out / JSON_NAME} and {args.out / PAGE_NAME}")
    state.wait_for_everyone()
    if state.num_processes > 1:
        state.destroy_process_group()


def _processes() -> Any:
    """accelerate's state; it starts the process group under `accelerate launch` and torchrun."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def _quieten() -> None:
    """transformers repeats a remark about minimal lengths with every batch that is generated."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def _add_what(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a local model, or a PEFT adapter")
    parser.add_argument("--probe", type=Path, required=True, help="JSONL, a `prompt` and the verifier's columns a line")
    parser.add_argument(
        "--correct",
        required=True,
        metavar="MODULE:FUNCTION",
        help="the reward function that means correct, in TRL's signature; imported from the current directory",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where samples and results go")
    parser.add_argument("--force", action="store_true", help="write into DIR though it holds other content")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a PEFT adapter to put on MODEL_DIR")
    parser.add_argument("--base", type=Path, metavar="DIR", help="base of an adapter given as MODEL_DIR")
    parser.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="progress bars; by default in a terminal only"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--samples", dest="num_samples", type=int, default=_DEFAULT.num_samples, help="of each prompt")
    group.add_argument("--prompts", type=int, metavar="M", help="drawn at random from the probe; all by default")
    group.add_argument("--temperature", type=float, default=_DEFAULT.temperature, help="of the softmax")
    group.add_argument("--max-new-tokens", type=int, default=_DEFAULT.max_new_tokens, help="of a completion")
    group.add_argument("--batch-size", type=int, default=_DEFAULT.batch_size, help="completions generated at once")
    group.add_argument("--seed", type=int, default=_DEFAULT.seed, help="of the draw, the sampling and the sketch")
    group.add_argument(
        "--correct-threshold", type=float, default=_DEFAULT.correct_threshold, help="rewards from here on are correct"
    )


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measuring")
    default = ",".join(map(str, _DEFAULT.ks))
    group.add_argument("--k", dest="ks", type=_ks, default=default, help="comma-separated, each at most --samples")
    group.add_argument("--threshold", type=float, default=_DEFAULT.threshold, help="cosine below which is conflict")
    group.add_argument("--confidence", type=float, default=_DEFAULT.confidence, help="of intervals and verdicts")
    group.add_argument("--gamma", type=float, default=_DEFAULT.gamma, help="cosine asked of project, as a prediction")
    group.add_argument("--floor-gamma", type=float, default=_DEFAULT.floor_gamma, help="cosine asked of the floor")
    group.add_argument("--last-layer", action="store_true", help="gradients of the last hidden layer alone")
    methods = ("kronecker", "countsketch")
    group.add_argument("--sketch-method", choices=methods, default=_DEFAULT.sketch_method, help="of the gradients")
    group.add_argument("--sketch-dim", type=int, default=_DEFAULT.sketch_dim, help="of the sketched gradients")
    group.add_argument("--max-tokens", type=int, default=_DEFAULT.max_tokens, help="in a forward pass of the sketch")
    group.add_argument("--protocol", choices=["paper"], help="add the table of arXiv 2602.21189")
    group.add_argument("--delta-1", type=float, default=_DEFAULT.delta_1, help="p-hat up to which a prompt is hard")
    group.add_argument("--delta-2", type=float, default=_DEFAULT.delta_2, help="p-hat from which a prompt is easy")


def _ks(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 1,2,4,8; found {text!r}") from None
