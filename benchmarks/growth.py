"""How time and memory of the guard grow: fitted exponents against tokens, prompts, parameters, dimension and ranks.

    python -m benchmarks.growth [--only prompts ranks]

Each line varies one quantity and holds the others; "exponent" is the slope of log cost over log size by least squares,
with its standard error: 1 is linear, 2 quadratic. Time is processor time of one thread, the least of `--repeats` runs,
since other processes can only add to it; memory the peak above what was there before. Prompts from 64 to 4,096: "sums"
grows the 2m x dim score sums by one batch of 8 prompts, "gram" takes the Gram matrix of the sums, "estimate" the
estimate with its jackknife and kernel. Parameters from 1M to 100M: one sketched batch. Ranks from 1 to 4 (gloo,
processes of one thread, in turn on few cores): bytes each rank hands to collectives in one refresh, counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.peak import peak_added
from passk_guard import estimate_conflict
from passk_guard.probe.score_sums import add_scores_, gram_matrix, sum_over_ranks_
from passk_guard.sketch import ScoreSketcher, TokenBatch
from passk_guard.utils.ranks import Ranks

PROMPTS = (64, 256, 1024, 4096)
TOKENS = (256, 512, 1024, 2048)
DIMS = (1024, 4096, 16384, 65536)
MODELS = ((64, 2048, 4), (192, 8192, 6), (512, 8192, 10), (768, 16384, 12))
"""Hidden size, vocabulary, layers: about 0.3M, 4M, 36M and 98M parameters."""
RANKS = (1, 2, 4)


def slope(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Exponent b of cost ~ size^b and its standard error, by least squares in logarithms."""
    x = torch.tensor(sizes, dtype=torch.float64).log()
    y = torch.tensor([max(cost, 1e-9) for cost in costs], dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    b = float(x @ y / (x @ x))
    if len(sizes) < 3:
        return b, math.nan
    return b, math.sqrt(float((y - b * x).square().sum()) / (len(sizes) - 2) / float(x @ x))


def cost(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Seconds of processor time, the least of the repeats, and the peak in MiB of a run of its own."""
    memory, seconds = peak_added(run) / 2**20, []
    for _ in range(repeats):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return min(seconds), memory


def show(what: str, sizes: Sequence[float], found: Sequence[tuple[float, float]]) -> None:
    seconds, memory = ([f[i] for f in found] for i in range(2))
    (b, e), (bm, em) = slope(sizes, seconds), slope(sizes, memory)
    spelled = ", ".join(
        f"{size:,.0f}: {s:.3g} s {m:.0f} MiB" for size, s, m in zip(sizes, seconds, memory, strict=True)
    )
    print(f"| {what} | {b:.2f} ± {e:.2f} | {bm:.2f} ± {em:.2f} | {spelled} |", flush=True)


def model_of(hidden: int, vocab: int, layers: int) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def batch_of(samples: int, width: int, vocab: int) -> TokenBatch:
    ids = torch.randint(vocab, (samples, width), generator=torch.Generator().manual_seed(0))
    completion = torch.ones_like(ids)
    completion[:, 0] = 0
    return TokenBatch(ids, torch.ones_like(ids), completion, torch.arange(samples))


def sketch_with(sketcher: ScoreSketcher, batch: TokenBatch, slots: int = 16) -> Callable[[], object]:
    return lambda: add_scores_(torch.zeros(slots, sketcher.dim), sketcher, batch, 1.0)


def prompts(repeats: int) -> None:
    dim = 1024
    sketcher, batch = ScoreSketcher(model_of(*MODELS[0]), dim), batch_of(8, 32, MODELS[0][1])
    sums, grams, estimates = [], [], []
    for m in PROMPTS:
        total, right = torch.randn(2 * m + 1, dim, generator=torch.Generator().manual_seed(m)).split((2 * m, 1))
        total = total + torch.cat([right, -right]).repeat_interleave(m, 0)  # a gradient to see, or there is no estimate
        sums.append(cost(lambda total=total: add_scores_(total, sketcher, batch, 1.0), max(repeats, 2)))
        every = torch.arange(2 * m)
        grams.append(cost(lambda total=total, rows=every: gram_matrix(total, rows), 1))
        gram, samples, correct = gram_matrix(total, every), torch.full((m,), 16), torch.arange(m) % 15 + 1
        estimates.append(cost(lambda g=gram, n=samples, c=correct: estimate_conflict(g, n, c, 8), 1))
    show("prompts: sums, one more batch", PROMPTS, sums)
    show("prompts: Gram matrix", PROMPTS, grams)
    show("prompts: estimate", PROMPTS, estimates)


def tokens(repeats: int) -> None:
    sketcher, vocab = ScoreSketcher(model_of(*MODELS[1]), 4096), MODELS[1][1]
    sketch_with(sketcher, batch_of(2, 64, vocab))()
    show(
        "tokens of a pass",
        TOKENS,
        [cost(sketch_with(sketcher, batch_of(t // 64, 64, vocab), 64), repeats) for t in TOKENS],
    )


def dimension(repeats: int) -> None:
    model, vocab, found = model_of(*MODELS[1]), MODELS[1][1], []
    for dim in DIMS:
        sketcher = ScoreSketcher(model, dim)
        sketch_with(sketcher, batch_of(2, 64, vocab))()
        found.append(cost(sketch_with(sketcher, batch_of(8, 64, vocab)), repeats))
    show("sketch dimension", DIMS, found)


def parameters(repeats: int) -> None:
    sizes, found = [], []
    for shape in MODELS:
        model = model_of(*shape)
        sizes.append(float(sum(p.numel() for p in model.parameters())))
        sketcher, batch = ScoreSketcher(model, 4096), batch_of(4, 64, shape[1])
        sketch_with(sketcher, batch_of(1, 8, shape[1]))()
        found.append(cost(sketch_with(sketcher, batch), repeats))
    show("parameters", sizes, found)


def of_a_rank(folder: Path) -> None:
    """What one rank does in the collectives of a refresh of 1,024 prompts, in a process of its own."""
    dist.init_process_group("gloo")
    ranks, total, handed = Ranks(torch.device("cpu")), torch.ones(2048, 1024), [0]
    reduce, send = dist.all_reduce, dist.broadcast

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def counting(tensor: torch.Tensor, *rest: object, **named: object) -> object:
            handed[0] += tensor.numel() * tensor.element_size()
            return call(tensor, *rest, **named)

        return counting

    dist.all_reduce, dist.broadcast = counted(reduce), counted(send)  # type: ignore[assignment]
    began = time.process_time()

    def collect() -> None:
        gram = gram_matrix(sum_over_ranks_(total, ranks), torch.arange(2048))
        ranks.from_first(gram)

    memory = peak_added(collect) / 2**20
    result = {"seconds": time.process_time() - began, "memory": memory, "handed": handed[0] / 2**20}
    (folder / f"{ranks.index}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)


def ranks(repeats: int) -> None:
    found = []
    for count in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            command += ["-m", "benchmarks.growth", "--rank-of", folder]
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
            if len(results) != count:
                sys.exit(done.stderr[-4000:])
        worst = {name: max(r[name] for r in results) for name in results[0]}
        found.append((worst["seconds"], worst["memory"]))
        print(f"| ranks {count} | | | {worst['handed']:.0f} MiB handed to collectives by each rank |", flush=True)
    show("ranks: sums and Gram matrix", RANKS, found)


SWEEPS = {"prompts": prompts, "tokens": tokens, "dimension": dimension, "parameters": parameters, "ranks": ranks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.rank_of:
        of_a_rank(given.rank_of)
        return
    print("| against | time, exponent | memory, exponent | measured |")
    print("|---|---|---|---|")
    for name in given.only:
        SWEEPS[name](given.repeats)


if __name__ == "__main__":
    main()
