"""Peak memory that a refresh and a mitigated step add, and what it grows with.

    python -m benchmarks.memory [--repeats 3]

Each row is a process of its own; "peak" is the median over processes of the peak resident memory above what model and
samples hold, in MiB. A Qwen2-type model of 6.5M parameters and 8,192 tokens of vocabulary, float32, samples of 64
tokens. "sketch" is a refresh in observe mode (score sums and Gram matrix); "direction" the protected gradient from the
same samples; "step" one plain forward and backward of a batch of the same token budget, for comparison. The last
column is the part that is kept: the score sums for the sketch, p for the direction.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

import torch

from benchmarks.peak import peak_added
from benchmarks.sketch_speed import build_model, plain

DIM, WIDTH, VOCAB, LAYERS = 4096, 64, 8192, 6
ROWS = [
    ("step", 16, 1024),
    ("step", 16, 4096),
    ("sketch", 16, 1024),
    ("sketch", 64, 1024),
    ("sketch", 256, 1024),
    ("sketch", 64, 4096),
    ("direction", 16, 1024),
    ("direction", 64, 1024),
]
"""What, prompts (two samples each), max_probe_tokens."""


def peak(what: str, prompts: int, max_tokens: int) -> tuple[int, int]:
    """Bytes at the peak, and bytes kept."""
    from passk_guard.mitigation.protected_direction import pass1_loss
    from passk_guard.probe.records import Outcomes, Rollouts
    from passk_guard.probe.refresh import Refresher
    from passk_guard.sketch import ScoreSketcher
    from passk_guard.utils.ranks import Ranks

    torch.set_num_threads(1)
    model = build_model(LAYERS, VOCAB, "cpu", torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    if what == "step":
        ids = torch.randint(VOCAB, (max_tokens // WIDTH, WIDTH))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": torch.ones_like(ids)}
        return peak_added(lambda: plain(model, batch, "train")), 4 * parameters
    ids = torch.randint(VOCAB, (2 * prompts, WIDTH)).tolist()
    rollouts = Rollouts(
        rows=[{}] * len(ids),
        prompt_index=[i // 2 for i in range(len(ids))],
        prompt_ids=[row[:8] for row in ids],
        completion_ids=[row[8:] for row in ids],
        completions=["x"] * len(ids),
        num_prompts=prompts,
    )
    outcomes = Outcomes(torch.tensor([i % 2 for i in range(len(ids))], dtype=torch.int8))
    refresher = Refresher(ScoreSketcher(model, DIM), Ranks(torch.device("cpu")), 2, max_tokens, 0)
    if what == "sketch":
        return peak_added(lambda: refresher.run(lambda: (rollouts, outcomes), (), 0)), 4 * 2 * prompts * DIM
    refresh = refresher.run(lambda: (rollouts, outcomes), (), 0)
    loss = pass1_loss(refresh, 1)

    def harvest() -> None:
        for batch in refresh.batches:
            loss(model, batch).backward()

    return peak_added(harvest), 4 * parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row is not None:
        print(*peak(*ROWS[given.row]))
        return
    print("| what | prompts | max_probe_tokens | peak, MiB | kept, MiB |")
    print("|---|---|---|---|---|")
    for number, (what, prompts, tokens) in enumerate(ROWS):
        found = []
        for _ in range(given.repeats):
            command = [sys.executable, "-m", "benchmarks.memory", "--row", str(number)]
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-4000:])
            found.append([int(x) / 2**20 for x in done.stdout.split()])
        most, kept = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"| {what} | {prompts} | {tokens:,} | {most:.0f} | {kept:.1f} |", flush=True)


if __name__ == "__main__":
    main()
