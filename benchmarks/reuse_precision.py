"""What bf16 autocast does to the ratios of kept rollouts: `python -m benchmarks.reuse_precision`.

A random Qwen2-type model of 4 layers in float32, 64 completions that it sampled itself. Their log-probabilities are
taken before and after its weights have moved by `move` times their own standard deviation, with the forward passes in
float32 and in bf16 autocast. Prints, for each length, log rho of whole sequences: its root mean square in float32, that
of bf16's difference from it, and the effective share of the samples in either; `move 0` in batches of half the size
shows what the shape of a batch does. Then the noise as the realised change measures it at a sample, from embeddings
that differ by one rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from passk_guard.passk.importance import effective_share
from passk_guard.probe.rescoring import jittered
from passk_guard.sketch import ScoreSketcher, TokenBatch, token_batches

VOCABULARY, PROMPT, SAMPLES = 512, 8, 64
LENGTHS, MOVES = (16, 64), (0.0, 0.003, 0.01)


def new_model() -> nn.Module:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def sampled(model: nn.Module, length: int) -> Tensor:
    """[SAMPLES, PROMPT + length] token ids, eight prompts eight times each."""
    ids = torch.randint(VOCABULARY, (8, PROMPT)).repeat_interleave(SAMPLES // 8, 0)
    with torch.no_grad():
        for _ in range(length):
            ids = torch.cat([ids, torch.multinomial(model(ids).logits[:, -1].softmax(-1), 1)], 1)
    return ids


def batches(ids: Tensor, size: int) -> Sequence[TokenBatch]:
    rows = ids.tolist()
    prompts, completions = [row[:PROMPT] for row in rows], [row[PROMPT:] for row in rows]
    room = size * ids.shape[1]
    return list(
        token_batches(prompts, completions, list(range(SAMPLES)), max_tokens=room, pad_token_id=0, device="cpu")
    )


def log_probs(model: nn.Module, found: Sequence[TokenBatch], *, bf16: bool) -> Tensor:
    """[SAMPLES] log pi of whole sequences, in float64, as a refresh takes them."""
    sketcher, out = ScoreSketcher(model, 64), torch.zeros(SAMPLES, dtype=torch.float64)
    for batch in found:
        part = torch.zeros(len(batch.slots), dtype=torch.float64)
        own = torch.arange(len(batch.slots))
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            sketcher.sketch(
                batch.input_ids,
                batch.attention_mask,
                batch.completion_mask,
                own,
                len(own),
                temperature=1.0,
                log_probs=part,
            )
        out[batch.slots] = part
    return out


def move(model: nn.Module, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.add_(size * p.std() * torch.randn(p.shape, generator=generator))


def share(log_ratios: Tensor) -> float:
    """Mean over the eight prompts."""
    ratios = log_ratios.view(8, -1)
    return float(effective_share(ratios, torch.ones_like(ratios, dtype=torch.bool)).mean())


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def rows() -> Iterator[tuple[object, ...]]:
    for length in LENGTHS:
        ids = sampled(new_model(), length)
        whole, half = batches(ids, 16), batches(ids, 8)
        then = {bf16: log_probs(new_model(), whole, bf16=bf16) for bf16 in (False, True)}
        for size, how in [(0.0, half), *((size, whole) for size in MOVES)]:
            model = new_model()
            move(model, size)
            plain, narrow = (log_probs(model, how, bf16=bf16) - then[bf16] for bf16 in (False, True))
            name = "halved batches" if how is half else f"{size:g}"
            yield length, name, rms(plain), rms(narrow - plain), share(plain), share(narrow)


def noise(length: int) -> float:
    """What `Rescorer.open` would call the noise of bf16 autocast."""
    model, plain = new_model(), new_model()
    whole = batches(sampled(plain, length), 16)
    torch.manual_seed(0)
    with jittered(model, torch.finfo(torch.bfloat16).eps / 2):
        return rms(log_probs(model, whole, bf16=True) - log_probs(plain, whole, bf16=True))


def main() -> None:
    torch.set_num_threads(1)
    print("| tokens | move | log rho, float32 | bf16 - float32 | share, float32 | share, bf16 |")
    print("|---" * 6 + "|")
    for length, name, *numbers in rows():
        print(f"| {length} | {name} | " + " | ".join(f"{number:.3g}" for number in numbers) + " |", flush=True)
    for length in LENGTHS:
        print(f"noise by jittered embeddings, {length} tokens: {noise(length):.3g}")


if __name__ == "__main__":
    main()
