"""Sketching at the sizes people train: random weights in the shape of Qwen2.5 0.5B, 1.5B and 7B, nothing downloaded.

    python -m benchmarks.gpu_shapes --shape 0.5b 1.5b 7b --width 1024 2048 4096
    python -m benchmarks.gpu_shapes --device cpu --shape tiny --width 64     # the same code anywhere, in seconds

For each shape, width and choice of gradient checkpointing, in bf16 and interleaved: the time of Kronecker sketching
and of the forward pass that the realised change takes ("rescore"), as ratios to one plain forward and backward on the
same tokens, and the most memory each needs on top of the model. `make gpu` runs a selection that fits into its time.
Then, once a shape: k_eff = 1/(rms error of pairwise cosines)^2 against exact gradients, and how far bf16 moves the
cosines, exact ones and sketched ones, from those of the same weights in fp32. Exact gradients come from autograd,
one sample at a time, the one it is compared with kept in the host's memory.

Weights are random, and then moved by a few steps of sign descent (which needs no state) on tokens with Zipf
frequencies: score vectors of untrained models resemble each other too little for k_eff to mean much.

Exits with status 1 if sketching costs more than 0.80 of a forward and backward for a model of 1B parameters or more
on a GPU. What does not fit in memory is said, and the run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.utils import is_flash_attn_2_available

from benchmarks.sketch_speed import build_batch, measure, peak_bytes, plain, zipf_text
from passk_guard.probe.passes import Scorer
from passk_guard.sketch import ScoreSketcher, TokenBatch
from passk_guard.utils.ranks import Ranks

RUNS = ("plain", "completion", "kronecker", "rescore")
TARGET = 0.80
"""Of a forward and backward, from 1B parameters on."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen2 model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


SHAPES = {
    "tiny": Shape(64, 160, 2, 4, 2, 2048, True),
    "0.5b": Shape(896, 4864, 24, 14, 2, 151_936, True),
    "1.5b": Shape(1536, 8960, 28, 12, 2, 151_936, True),
    "7b": Shape(3584, 18_944, 28, 28, 4, 152_064, False),
}


def build_model(shape: Shape, device: str, dtype: torch.dtype, attention: str) -> nn.Module:
    """A model of that shape with random weights, made on the device."""
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32_768,
        rope_theta=1_000_000.0,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()  # transformers 5.0 leaves this out on the meta device
    return model.train()


def sign_descent(model: nn.Module, steps: int, vocabulary: int, device: str, rate: float = 3e-4) -> None:
    """Move every weight by `rate` against the sign of its gradient, `steps` times."""
    for _ in range(steps):
        input_ids = zipf_text(4, 128, vocabulary).to(device)
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad.sign(), alpha=rate)
        model.zero_grad(set_to_none=True)


def exact_cosines(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cosines [pairs] of the score vectors, float64, by autograd; gradients are recomputed rather than kept."""
    parameters, count = list(model.parameters()), len(batch["slots"])

    def gradients(sample: int) -> list[Tensor]:
        one = {name: tensor[sample : sample + 1] for name, tensor in batch.items()}
        plain(model, one, "completion", keep=True)
        found = [p.grad for p in parameters if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return found

    def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
        return sum(
            float(torch.linalg.vecdot(x.to(y.device).flatten().float(), y.flatten().float()))
            for x, y in zip(xs, ys, strict=True)
        )

    gram = torch.zeros(count, count, dtype=torch.float64)
    for first in range(count):
        held = [gradient.cpu() for gradient in gradients(first)]
        gram[first, first] = dot(held, held)
        for second in range(first + 1, count):
            gram[first, second] = dot(held, gradients(second))
    return cosines_of(gram)


def cosines_of(gram: Tensor) -> Tensor:
    """Cosines [pairs] from the upper triangle of a Gram matrix."""
    norms, pairs = gram.diagonal().sqrt(), torch.triu_indices(len(gram), len(gram), 1)
    return gram[pairs[0], pairs[1]] / (norms[pairs[0]] * norms[pairs[1]])


def sketched_cosines(sketcher: ScoreSketcher, batch: dict[str, Tensor], seeds: int) -> Tensor:
    """Cosines [seeds, pairs] of the sketched score vectors, float64."""
    rows = []
    for seed in range(seeds):
        sketcher.reseed(seed)
        sketch = sketcher.sketch(**batch, num_slots=len(batch["slots"])).double().cpu()
        rows.append(cosines_of(sketch @ sketch.T))
    return torch.stack(rows)


def largest_cosine_shift(found: Tensor, reference: Tensor) -> float:
    """Largest absolute difference between two sets of cosines."""
    return float((found - reference).abs().max())


def attempt(run: Callable[[], Any]) -> Any:
    """What `run` returns, or None where it did not fit in memory."""
    try:
        return run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def speed(model: Any, shape: Shape, width: int, checkpointing: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes of a plain pass and of the sketch, on `samples` x `width` tokens."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    batch = build_batch(args.samples, width, width // 8, shape.vocabulary, 2, args.device)
    sketcher = ScoreSketcher(model, dim=args.dim)
    scorer, scored = Scorer(model, Ranks(torch.device(args.device)), 0), TokenBatch(**batch)
    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(model, batch, "train"),
        "completion": lambda: plain(model, batch, "completion"),
        "kronecker": lambda: sketcher.sketch(**batch, num_slots=2),
        "rescore": lambda: scorer.log_probs(scored, 1.0),
    }
    fitting = {name: peak for name in runs if (peak := attempt(lambda n=name: peak_bytes(runs[n], args.device)))}
    seconds = measure({name: runs[name] for name in fitting}, args.repeats, args.device) if fitting else {}
    return {"width": width, "checkpointing": bool(checkpointing), "seconds": seconds, "peak_bytes": fitting}


def accuracy(model: Any, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """k_eff in the model's dtype, and how far that dtype moves cosines from fp32. Turns `model` into fp32."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    sign_descent(model, args.train_steps, shape.vocabulary, args.device)
    width = min(args.width)
    batch = build_batch(args.pairs_of, width, width // 8, shape.vocabulary, args.pairs_of, args.device)
    low, low_sketched = exact_cosines(model, batch), sketched_cosines(ScoreSketcher(model, args.dim), batch, args.seeds)
    model.set_attn_implementation("sdpa")  # flash attention knows no fp32
    model.float()
    exact, sketched = exact_cosines(model, batch), sketched_cosines(ScoreSketcher(model, args.dim), batch, args.seeds)
    return {
        "cosines": exact.tolist(),
        "k_eff": 1 / float((low_sketched - exact).square().mean()),
        "k_eff_fp32": 1 / float((sketched - exact).square().mean()),
        "exact_cosine_shift": largest_cosine_shift(low, exact),
        "sketched_cosine_shift": largest_cosine_shift(low_sketched, sketched),
    }


def report(name: str, row: dict[str, Any]) -> str:
    """One line on a row of `speed`."""
    cells = []
    for run in RUNS:
        if run not in row["seconds"]:
            cells.append(f"{run}: out of memory")
            continue
        seconds = row["seconds"]
        ratios = [seconds[run] / seconds[base] for base in ("plain", "completion") if base in seconds]
        listed = "/".join(f"{ratio:.2f}" for ratio in ratios)
        cells.append(f"{run} {seconds[run] * 1e3:.0f} ms ({listed}) {row['peak_bytes'][run] / 2**30:.2f} GiB")
    how = "checkpointed" if row["checkpointing"] else "all kept"
    return f"{name:5s} {row['width']:5d} tokens a sample, {how:12s}  " + "   ".join(cells)


def too_slow(parameters: int, row: dict[str, Any]) -> bool:
    """Whether a row misses the target, where one is set."""
    seconds = row["seconds"]
    if parameters < 1e9 or not {"plain", "kronecker"} <= seconds.keys():
        return False
    return seconds["kronecker"] / seconds["plain"] > TARGET


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["0.5b", "1.5b", "7b"])
    parser.add_argument("--width", nargs="+", type=int, default=[1024, 2048, 4096], help="tokens a sample")
    parser.add_argument("--checkpointing", nargs="+", type=int, choices=[0, 1], default=[0, 1])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--attention", default=None, help="default: flash_attention_2 where installed, else sdpa")
    parser.add_argument("--dim", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train-steps", type=int, default=10)
    parser.add_argument("--pairs-of", type=int, default=4, help="samples whose pairs give k_eff; 0: leave it out")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here too")
    args = parser.parse_args(argv)
    if args.attention is None:
        flash = args.device != "cpu" and is_flash_attn_2_available()
        args.attention = "flash_attention_2" if flash else "sdpa"
    return args


def measured(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row of `speed` for each width and choice of checkpointing, then one of `accuracy` unless it is left out."""
    shape = SHAPES[name]
    model: Any = build_model(shape, args.device, getattr(torch, args.dtype), args.attention)
    parameters = sum(p.numel() for p in model.parameters())
    common = {"shape": name, "parameters": parameters, "dtype": args.dtype, "attention": args.attention}
    for width in args.width:
        for checkpointing in args.checkpointing:
            row = speed(model, shape, width, checkpointing, args)
            base = row["seconds"].get("plain")
            ratios = {run: seconds / base for run, seconds in row["seconds"].items()} if base else {}
            yield common | row | {"ratios": ratios, "too_slow": args.device != "cpu" and too_slow(parameters, row)}
    if args.pairs_of:
        close = attempt(lambda: accuracy(model, shape, args))
        yield common | {"dim": args.dim, "accuracy": close}


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    device = torch.cuda.get_device_name() if args.device != "cpu" else "cpu"
    print(f"{device}, {args.dtype}, {args.attention}; ratios to plain / plain with the head on completion tokens")
    found = []
    for row in (row for name in args.shape for row in measured(name, args)):
        found.append(row)
        name, parameters = row["shape"], row["parameters"]
        if "accuracy" not in row:
            print(report(name, row), flush=True)
        elif (close := row["accuracy"]) is not None:
            print(
                f"{name:5s} {parameters:,} parameters: k_eff {close['k_eff']:,.0f} at {args.dim} "
                f"(fp32 {close['k_eff_fp32']:,.0f}); {args.dtype} moves cosines by at most "
                f"{close['exact_cosine_shift']:.4f} exact, {close['sketched_cosine_shift']:.4f} sketched"
            )
        else:
            print(f"{name:5s} {parameters:,} parameters: exact gradients did not fit in memory")
    if args.json is not None:
        args.json.write_text(json.dumps({"device": device, "rows": found}, indent=1))
    return int(any(row.get("too_slow", False) for row in found))


if __name__ == "__main__":
    sys.exit(main())
