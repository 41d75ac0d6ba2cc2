"""Peak memory that a refresh and a mitigated step add, the time they take, and what both grow with.

    python -m benchmarks.memory [--repeats 3] [--model 8M 135M 8k]

Each row is a process of its own; "peak" is the median over processes of the peak resident memory above what model and
samples hold, in MiB, and "CPU s" that of its time. "8M" is a Qwen2-type model with a vocabulary of 8,192, "135M" has
the shape of SmolLM2-135M, "8k" two layers of width 64 with the same vocabulary as 8M; random weights, float32, one
thread, samples of 64 tokens, with "8k" of 8,192, one a pass. "sketch" is a refresh in observe
mode without its sampling (score sums and Gram matrix); "change" what opens a window of the realised change and closes
it, a forward pass each; "direction" the protected gradient from the same samples; "step"
one plain forward and backward of a batch of the same token budget, for comparison. "LoRA" trains adapters of rank 16
on all linear layers, "all" every weight. The last column is the part that is kept: the score sums for the sketch, p for
the direction.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peak import peak_added
from benchmarks.sketch_speed import build_model, plain

DIM, WIDTH, VOCAB, LAYERS = 4096, 64, 8192, 6
ROWS = [
    ("step", "8M", "all", 16, 1024),
    ("step", "8M", "all", 16, 4096),
    ("sketch", "8M", "all", 16, 1024),
    ("sketch", "8M", "all", 64, 1024),
    ("sketch", "8M", "all", 256, 1024),
    ("sketch", "8M", "all", 64, 4096),
    ("direction", "8M", "all", 16, 1024),
    ("direction", "8M", "all", 64, 1024),
    ("step", "8M", "LoRA", 16, 4096),
    ("sketch", "8M", "LoRA", 64, 1024),
    ("sketch", "8M", "LoRA", 64, 4096),
    ("step", "135M", "all", 16, 1024),
    ("sketch", "135M", "all", 16, 512),
    ("sketch", "135M", "all", 16, 1024),
    ("step", "135M", "LoRA", 16, 1024),
    ("sketch", "135M", "LoRA", 16, 1024),
    ("step", "8k", "all", 1, 8192),
    ("sketch", "8k", "all", 1, 8192),
    ("sketch", "8k", "all", 4, 8192),
    ("change", "8k", "all", 4, 8192),
    ("direction", "8k", "all", 1, 8192),
]
"""What, of which model, what is trained, prompts (two samples each), max_probe_tokens."""
WIDTHS = {"8M": WIDTH, "135M": WIDTH, "8k": 8192}


def model_of(size: str, trained: str) -> Any:
    """A model with random weights; with LoRA only its adapters require grad."""
    if size == "8M":
        model: Any = build_model(LAYERS, VOCAB, "cpu", torch.float32)
    else:
        from transformers import AutoModelForCausalLM, LlamaConfig

        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
        if size == "8k":
            shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": VOCAB}
            heads |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": WIDTHS[size]}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, **heads), dtype=torch.float32)
    if trained == "LoRA":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


def peak(what: str, size: str, trained: str, prompts: int, max_tokens: int) -> tuple[int, int, float]:
    """Bytes at the peak, bytes kept, and seconds of the CPU."""
    from passk_guard.mitigation.protected_direction import pass1_loss
    from passk_guard.probe.records import Outcomes, Rollouts
    from passk_guard.probe.refresh import Refresher
    from passk_guard.probe.rescoring import Rescorer
    from passk_guard.sketch import ScoreSketcher
    from passk_guard.utils.ranks import Ranks

    torch.set_num_threads(1)
    model, width = model_of(size, trained), WIDTHS[size]
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if what == "step":
        ids = torch.randint(VOCAB, (max_tokens // width, width))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": torch.ones_like(ids)}
        return timed(lambda: plain(model, batch, "train"), 4 * parameters)
    ids = torch.randint(VOCAB, (2 * prompts, width)).tolist()
    rollouts = Rollouts(
        rows=[{}] * len(ids),
        prompt_index=[i // 2 for i in range(len(ids))],
        prompt_ids=[row[:8] for row in ids],
        completion_ids=[row[8:] for row in ids],
        completions=["x"] * len(ids),
        num_prompts=prompts,
    )
    outcomes = Outcomes(torch.tensor([i % 2 for i in range(len(ids))], dtype=torch.int8))
    ranks = Ranks(torch.device("cpu"))
    if what == "change":
        scorer = Rescorer(model, ranks, max_tokens, 0, vocabulary=VOCAB)
        keys = list(map(str, range(prompts)))
        return timed(lambda: scorer.log_ratios(scorer.open(rollouts, outcomes, keys, 0)), 8 * 2 * prompts)
    refresher = Refresher(ScoreSketcher(model, DIM), ranks, 2, max_tokens, 0)
    if what == "sketch":
        return timed(lambda: refresher.run(lambda: (rollouts, outcomes), (), 0), 4 * 2 * prompts * DIM)
    refresh = refresher.run(lambda: (rollouts, outcomes), (), 0)
    loss = pass1_loss(refresh, 1)

    def harvest() -> None:
        for batch in refresh.batches:
            loss(model, batch).backward()

    return timed(harvest, 4 * parameters)


def timed(run: Callable[[], object], kept: int) -> tuple[int, int, float]:
    """What `peak` returns of a run."""
    began = time.process_time()
    return peak_added(run), kept, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row is not None:
        print(*peak(*ROWS[given.row]))
        return
    print("| what | model | trained | prompts | max_probe_tokens | peak, MiB | kept, MiB | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for number, (what, size, trained, prompts, tokens) in enumerate(ROWS):
        if size not in given.model:
            continue
        rows = []
        for _ in range(given.repeats):
            command = [sys.executable, "-m", "benchmarks.memory", "--row", str(number)]
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-4000:])
            rows.append([float(x) for x in done.stdout.split()])
        most, kept, seconds = (statistics.median(column) for column in zip(*rows, strict=True))
        cells = (what, size, trained, prompts, f"{tokens:,}", f"{most / 2**20:.0f}", f"{kept / 2**20:.1f}")
        print("|", *(f"{cell} |" for cell in cells), f"{seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
