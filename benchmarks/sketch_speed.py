"""Time, memory and accuracy of score sketching, side by side with a plain forward and backward on the same tokens.

    OMP_NUM_THREADS=1 python benchmarks/sketch_speed.py

Prints, as ratios to one plain forward and backward (median of interleaved repetitions): the forward alone, a
forward and backward with frozen weights (no hook method that keeps the plain head can be faster), a plain one whose
head sees the completion tokens alone (as the sketch's head does: a trainer may do the same), and the sketching
methods, without and with the head's closed form. Beside them the most memory that each needs on top of the model.

Then k_eff = 1/(rms error of pairwise cosines)^2 against exact gradients, the size of an ideal random projection with
the same error; and that of the mean over pairs, which is what the guard's estimate is: smaller, since pairs share the
projection and their errors are correlated. Both are taken after a few training steps on tokens with Zipf frequencies,
where score vectors resemble each other: with random weights and uniform tokens they do not, and every method looks
better.

Last, the sketch of a probe, `--probe` prompts times 16 completions of 16 tokens behind 200 prompt tokens, half of them
right: each completion behind a prompt of its own, against those of one outcome side by side behind one prompt. And
their sampling: a pass over the prompt for each completion, against copies of one cache.

Exits with status 1 if Kronecker sketching costs more than 0.95 of a plain forward and backward, CountSketch more than
1.15, k_eff of the former is below 4,000 at 16,384 numbers, or the probe with shared prompts takes more than 0.22 of
the time (0.19 of the tokens, and the same work in the head) or differs by more than 1e-4.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from passk_guard.probe.samplers import GenerateSampler
from passk_guard.probe.score_sums import add_scores_
from passk_guard.sketch import ScoreSketcher, token_batches


def build_model(layers: int, vocab: int, device: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)


def zipf_text(samples: int, width: int, vocab: int) -> torch.Tensor:
    """Tokens [samples, width] with Zipf frequencies; seven in ten follow from the token before."""
    frequency = 1 / torch.arange(1, vocab + 1).float() ** 1.1
    successors = torch.randint(vocab, (vocab, 4), generator=torch.Generator().manual_seed(0))
    columns = [torch.multinomial(frequency, samples, replacement=True)]
    for _ in range(width - 1):
        fresh = torch.multinomial(frequency, samples, replacement=True)
        follows = successors[columns[-1], torch.randint(4, (samples,))]
        columns.append(torch.where(torch.rand(samples) < 0.7, follows, fresh))
    return torch.stack(columns, 1)


def train(model: torch.nn.Module, steps: int, vocab: int, device: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        input_ids = zipf_text(8, 64, vocab).to(device)
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def build_batch(samples: int, width: int, prompt: int, vocab: int, slots: int, device: str) -> dict[str, torch.Tensor]:
    input_ids = zipf_text(samples, width, vocab).to(device)
    completion_mask = torch.ones_like(input_ids)
    completion_mask[:, :prompt] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "completion_mask": completion_mask,
        "slots": torch.arange(samples, device=device) % slots,
    }


def plain(model: torch.nn.Module, batch: dict[str, torch.Tensor], mode: str, keep: bool = False) -> None:
    """One forward ("forward"), with backward to the embeddings ("frozen") or to the weights ("train").

    With "completion" like "train", the head on the positions alone that predict completion tokens. The gradients
    are dropped unless `keep`.
    """
    trained = mode in ("train", "completion")
    model.requires_grad_(trained)
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: out.requires_grad_() if mode == "frozen" else out
    )
    prompt = int((batch["completion_mask"][0] == 0).sum())  # the same in every row
    first = prompt - 1 if mode == "completion" else 0
    where = torch.arange(first, batch["input_ids"].shape[1] - 1, device=batch["input_ids"].device)
    kept = {"logits_to_keep": where} if mode == "completion" else {}
    with torch.set_grad_enabled(mode != "forward"):
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**tokens, use_cache=False, **kept).logits
        targets = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, first + 1 :]
        rows = logits[:, : len(where)].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(rows, targets.flatten())
        if mode != "forward":
            loss.backward()
    handle.remove()
    if not keep:
        model.zero_grad(set_to_none=True)
    model.requires_grad_(True)


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most memory allocated at a time during `run` beyond what was before, as the allocator counts it."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def with_plain_head(sketcher: ScoreSketcher) -> ScoreSketcher:
    """The same, made to go through the model's own head and all its logits."""
    sketcher._closed = False
    return sketcher


def measure(runs: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each run, the runs taken in turn so that they share whatever else the machine does.

    On the CPU processor time, which other processes disturb less than they do the clock on the wall.
    """
    now = time.process_time if device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            if device != "cpu":
                torch.cuda.synchronize()
            start = now()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat > 0:  # the first round warms caches and draws the projections
                seconds[name].append(now() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def cosines(rows: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    pairs = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    return (unit @ unit.T)[pairs[0], pairs[1]]


def k_eff(model: torch.nn.Module, batch: dict[str, torch.Tensor], method: str, dim: int, seeds: int) -> list[float]:
    """Of one pair, and of the mean over pairs: 1/(its squared error times the number of pairs).

    All pairs share one projection, so their errors are correlated and the mean errs more than independent errors would.
    """
    samples = len(batch["slots"])
    exact = cosines(ScoreSketcher(model, method="identity").sketch(**batch, num_slots=samples))
    sketcher = ScoreSketcher(model, dim=dim, method=method)
    errors = []
    for seed in range(seeds):
        sketcher.reseed(seed)
        errors.append(cosines(sketcher.sketch(**batch, num_slots=samples)) - exact)
    found = torch.stack(errors)
    return [1 / float(found.square().mean()), 1 / float(found.mean(1).square().mean() * found.shape[1])]


def probe_sums(
    model: torch.nn.Module, sketcher: ScoreSketcher, prompts: int, shared: bool, device: str
) -> torch.Tensor:
    """The score sums [2 m, dim] of random completions, in passes of 16,384 tokens as by default."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.get_input_embeddings().num_embeddings
    texts = torch.randint(vocab, (prompts, 200), generator=generator).tolist()
    number = 16 * prompts
    completions = torch.randint(vocab, (number, 16), generator=generator).tolist()
    slots = [i // 16 + prompts * (i % 2) for i in range(number)]
    sums = torch.zeros(2 * prompts, sketcher.dim, device=device)
    for batch in token_batches(
        [texts[i // 16] for i in range(number)],
        completions,
        slots,
        max_tokens=16384,
        pad_token_id=0,
        device=device,
        groups=slots if shared else None,
        room=lambda prompt: 256,
    ):
        add_scores_(sums, sketcher, batch, 1.0)
    return sums


def share_prompts(model: torch.nn.Module, sketcher: ScoreSketcher, args: argparse.Namespace) -> bool:
    """Print the time of a probe's sketch with and without shared prompts, and whether the former is fast and right."""
    sums: dict[str, torch.Tensor] = {}

    def run(name: str, shared: bool) -> None:
        sums[name] = probe_sums(model, sketcher, args.probe, shared, args.device)

    names = {"probe, each alone": False, "probe, shared prompts": True}
    seconds = measure({name: partial(run, name, shared) for name, shared in names.items()}, 3, args.device)
    alone, shared = seconds.values()
    plain_sums, shared_sums = sums.values()
    error = float((shared_sums - plain_sums).norm() / plain_sums.norm())
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    sampler = GenerateSampler(model, tokenizer, max_new_tokens=16)
    prompts = torch.randint(2, args.vocab, (args.probe, 200)).repeat_interleave(16, 0).tolist()

    def sample(copies: bool) -> None:
        sampler._copies = copies
        sampler._generate(prompts, 0)

    names = {"sampling, each alone": False, "sampling, copied caches": True}
    seconds |= measure({name: partial(sample, copies) for name, copies in names.items()}, 3, args.device)
    for name, value in seconds.items():
        ratio = value / (alone if name.startswith("probe") else seconds["sampling, each alone"])
        print(f"{name:26s} {value:8.2f} s    ratio {ratio:.3f}   {args.probe} x 16 completions")
    print(f"difference of the sums     {error:.1e}")
    return shared / alone <= 0.22 and error < (1e-4 if args.dtype == "float32" else 0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--train-steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3, help="projections; the k_eff of the mean takes 50")
    parser.add_argument("--dim", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--slots", type=int, default=2, help="slots while timing; k_eff takes one a sample")
    parser.add_argument("--probe", type=int, default=8, help="prompts of the probe; 0: none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()

    model = build_model(args.layers, args.vocab, args.device, getattr(torch, args.dtype))
    batch = build_batch(args.samples, args.width, args.prompt, args.vocab, args.slots, args.device)
    kron, count, kron_plain, count_plain = (
        ScoreSketcher(model, dim=args.dim, method=m) for m in ("kronecker", "countsketch") * 2
    )
    with_plain_head(kron_plain), with_plain_head(count_plain)
    runs: dict[str, Callable[[], object]] = {
        "plain forward+backward": lambda: plain(model, batch, "train"),
        "the same, completion head": lambda: plain(model, batch, "completion"),
        "forward only": lambda: plain(model, batch, "forward"),
        "frozen forward+backward": lambda: plain(model, batch, "frozen"),
        "kronecker": lambda: kron.sketch(**batch, num_slots=args.slots),
        "kronecker, plain head": lambda: kron_plain.sketch(**batch, num_slots=args.slots),
        "countsketch": lambda: count.sketch(**batch, num_slots=args.slots),
        "countsketch, plain head": lambda: count_plain.sketch(**batch, num_slots=args.slots),
    }
    seconds = measure(runs, args.repeats, args.device)
    base, fair = seconds["plain forward+backward"], seconds["the same, completion head"]
    for name, value in seconds.items():
        peak = peak_bytes(runs[name], args.device) / 2**20
        print(f"{name:26s} {value * 1e3:8.1f} ms   ratio {value / base:.2f} ({value / fair:.2f})   {peak:7.0f} MiB")
    print("In brackets: to the plain pass whose head sees the completion tokens alone.")
    faster = not args.probe or share_prompts(model, kron, args)
    train(model, args.train_steps, args.vocab, args.device)
    per_sample = batch | {"slots": torch.arange(args.samples, device=args.device)}
    found = {m: k_eff(model, per_sample, m, args.dim, args.seeds) for m in ("kronecker", "countsketch")}
    for method, (value, of_mean) in found.items():
        print(f"{method:26s} dim {args.dim}, k_eff {value:,.0f}, of the mean over pairs {of_mean:,.0f}")
    accurate = args.dim != 16384 or found["kronecker"][0] >= 4000
    return int(seconds["kronecker"] / base > 0.95 or seconds["countsketch"] / base > 1.15 or not (accurate and faster))


if __name__ == "__main__":
    sys.exit(main())
