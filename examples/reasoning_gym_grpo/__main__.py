"""GRPO on pass@8 on tasks of reasoning-gym, observed by the guard and guarded by it.

    python -m examples.reasoning_gym_grpo [--seed 0] [--quick] [--out runs/reasoning_gym]

A model from scratch is trained on four tasks (supervised, cached), then twice by GRPO on pass@8 from there: in
`observe` the guard changes nothing, in `guarded` it turns each gradient that would cost pass@1. Right is what
reasoning-gym's own verifier gives full marks. Nothing was planted: the tasks are reasoning-gym's, in equal shares, and
whether they interfere is for the run to show. In the folder of the seed:

    results.jsonl               pass@1 and pass@8 before and after, all and by task, and the changes of verdict
    ARM/passk_guard.jsonl       what the guard saw and did
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import torch
import transformers
from rich.console import Console
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from examples.reasoning_gym_grpo.evaluation import count_correct
from examples.reasoning_gym_grpo.grpo import ARMS, QUICK, Plan, run_arm
from examples.reasoning_gym_grpo.report import Comparison, print_table, print_verdicts, write_results
from examples.reasoning_gym_grpo.tasks import Row, make_rows
from examples.reasoning_gym_grpo.warm_start import warm_start, warm_start_dir


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], plan: Plan, title: str
) -> Tensor:
    """`count_correct` with a progress bar, and the same random numbers for every model."""
    with tqdm(total=len(rows) * plan.test_samples, desc=f"test, {title}", unit="completion", disable=None) as bar:
        return count_correct(
            model, tokenizer, rows, plan.test_samples, seed=0, on_progress=lambda done, _: bar.update(done - bar.n)
        )


def compare(plan: Plan, seed: int, out: Path, cache: Path) -> Comparison:
    """The warm start and both arms, each evaluated on the same test prompts."""
    model_dir = warm_start(cache, seed, plan.warm_steps)
    rows = make_rows("test", plan.test_prompts, seed)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    before = evaluate(AutoModelForCausalLM.from_pretrained(model_dir), tokenizer, rows, plan, "warm start")
    after, events = {}, {}
    for arm in ARMS:
        trainer, events[arm] = run_arm(arm, model_dir, out / arm, plan, seed)
        after[arm] = evaluate(trainer.model, tokenizer, rows, plan, arm)
    return Comparison(plan, rows, before, after, events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts, the model and the training")
    parser.add_argument("--out", type=Path, default=Path("runs/reasoning_gym"), help="where results are written")
    parser.add_argument("--cache", type=Path, help="where warm starts are kept; by default OUT/warm_start")
    parser.add_argument("--quick", action="store_true", help="a run of seconds that shows that everything works")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the stack's own renamed settings
    transformers.utils.logging.disable_progress_bar()  # of reading a model of 3 MB

    console, plan = Console(), QUICK if args.quick else Plan()
    cache = args.cache or args.out / "warm_start"
    cached = "cached" if warm_start_dir(cache, args.seed, plan.warm_steps).exists() else "to be trained, 3 minutes"
    console.print(
        f"Plan: warm start ({'seconds' if args.quick else cached}), then {plan.steps} GRPO steps on pass@{plan.k} with "
        f"the guard observing and {plan.steps} with it guarding" + ("." if args.quick else ", 2-3 minutes each."),
        soft_wrap=True,
    )
    out = args.out / f"{'quick-' if args.quick else ''}seed{args.seed}"
    started = time.monotonic()
    with logging_redirect_tqdm([logging.getLogger("passk_guard")]):
        comparison = compare(plan, args.seed, out, cache)
    write_results(out / "results.jsonl", comparison, args.seed)
    print_table(console, comparison, args.seed)
    print_verdicts(console, comparison)
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes. Results: {out / 'results.jsonl'}", soft_wrap=True)


if __name__ == "__main__":
    main()
