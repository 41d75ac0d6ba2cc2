"""GRPO on pass@8 with a pretrained model of 135M parameters, observed by the guard and guarded by it.

    make pretrained                                        # once: the model folder
    python -m examples.pretrained --quick                  # two CPU cores
    python -m examples.pretrained --seeds 0 1 2            # a GPU

For each seed a short supervised training for the form of the answer, then a GRPO run for each mitigation from there:
`none` observes, any other name is the guard's setting `mitigation`. Pass rates before and after are exact. One JSON
line a run goes to --results, with the seed, the sizes and what the guard saw; runs that the file holds are not made
again. Whether pass@8 is bought with pass@1 here is for the runs to show.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.pretrained.evaluation import rates, success_probability
from examples.pretrained.model import HOME, MODEL
from examples.pretrained.task import make_rows
from examples.pretrained.train import QUICK, Plan, grpo, sft

Record = dict[str, Any]
SIZES = tuple(field.name for field in fields(Plan) if field.type == "int")


def run(model_dir: Path, out: Path, plan: Plan, seed: int, mitigation: str) -> Record:
    """One run from the supervised model of its seed, as a record."""
    start = sft(model_dir, out, plan, seed)
    rows, tokenizer = make_rows("test", plan.test_prompts, seed, plan.longest), AutoTokenizer.from_pretrained(start)
    before = success_probability(_on_device(AutoModelForCausalLM.from_pretrained(start)), tokenizer, rows)
    began = time.monotonic(), time.process_time()
    model, events = grpo(start, out / f"{mitigation}-seed{seed}", plan, seed, mitigation)
    seconds, work = time.monotonic() - began[0], time.process_time() - began[1]
    after = success_probability(model, tokenizer, rows)
    return {
        "mitigation": mitigation,
        "seed": seed,
        "plan": asdict(plan),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(work, 1),
        "before": rates(before, rows, plan.k),
        "after": rates(after, rows, plan.k),
        "guard": seen(events, plan.k),
    }


def seen(events: Sequence[Record], k: int) -> Record:
    """What the guard saw and did, from its journal."""

    def pick(kind: str, *names: str) -> list[Record]:
        return [{n: event[n] for n in ("step", *names) if n in event} for event in events if event["event"] == kind]

    changes = [f"pass_at_{j}_{name}" for j in (1, k) for name in ("change", "change_se", "total", "total_ci_low")]
    return {
        "refreshes": pick(
            "refresh", "verdict", "pass_at_1", f"pass_at_{k}", "cosine", "cosine_ci_low", "cosine_ci_high"
        ),
        "windows": pick("change", "since", *changes, "pass_at_1_total_ci_high", "effective_samples", "groups"),
        "verdicts": pick("state", "from", "to") + pick("outcome", "from", "to"),
        "failed": pick("failed_refresh", "reason"),
        "mitigated": sum((event.get("mitigated") or 0) > 0 for event in events if event["event"] == "steps"),
    }


def _on_device(model: Any) -> Any:
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def print_table(console: Console, records: Sequence[Record]) -> None:
    """Exact rates at the start and their change in each arm, in all and by length: means over seeds, and the range."""
    k = records[0]["plan"]["k"]
    arms = list(dict.fromkeys(record["mitigation"] for record in records))
    steps, seeds = sorted({r["plan"]["steps"] for r in records}), sorted({r["seed"] for r in records})
    title = f"Exact change in {', '.join(map(str, steps))} steps on pass@{k}, seeds {', '.join(map(str, seeds))}"
    table = Table("", "length", "start", title=title, title_justify="left")
    for arm in arms:
        table.add_column(arm, justify="right")
    for j in (1, k):
        name = f"pass_at_{j}"
        for group in records[0]["before"]:
            cells = [f"{statistics.mean(r['before'][group][name] for r in records):.3f}"]
            for arm in arms:
                found = [r["after"][group][name] - r["before"][group][name] for r in records if r["mitigation"] == arm]
                spread = f" ({min(found):+.3f} to {max(found):+.3f})" if len(found) > 1 else ""
                cells.append(f"{statistics.mean(found):+.3f}{spread}")
            table.add_row(f"pass@{j}" if group == "all" else "", group, *cells)
        table.add_section()
    console.print(table)


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sizes for two CPU cores")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--mitigations", nargs="+", default=["none", "hold", "reweight", "project"])
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder; default: what `make pretrained` makes")
    parser.add_argument("--out", type=Path, default=HOME, help="where supervised models and journals are kept")
    parser.add_argument("--results", type=Path, help="JSON lines; default: OUT/results.jsonl")
    parser.add_argument("--report", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on a CPU")
    for size in SIZES:
        parser.add_argument(f"--{size.replace('_', '-')}", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    transformers.utils.logging.disable_progress_bar()
    chosen = {size: getattr(given, size) for size in SIZES if getattr(given, size) is not None}
    plan, results = replace(QUICK if given.quick else Plan(), **chosen), given.results or given.out / "results.jsonl"
    if not given.report and not given.model.is_dir():
        parser.error(f"expected a model folder at {given.model}: run `make pretrained`, or pass --model")
    wanted = [(seed, arm) for seed in given.seeds for arm in given.mitigations]
    done = {(r["seed"], r["mitigation"]) for r in read(results) if r["plan"] == asdict(plan)}
    for seed, mitigation in wanted * (not given.report):
        if (seed, mitigation) not in done:
            with logging_redirect_tqdm([logging.getLogger("passk_guard")]):
                record = run(given.model, given.out, plan, seed, mitigation)
            results.parent.mkdir(parents=True, exist_ok=True)
            with results.open("a") as file:
                file.write(json.dumps(record) + "\n")
    found = [r for r in read(results) if r["plan"] == asdict(plan) and (r["seed"], r["mitigation"]) in wanted]
    if found:
        print_table(Console(), found)


if __name__ == "__main__":
    main()
