"""Real gradients for the calibration: every completion's score vector, from the demo's model along an unguarded run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PrinterCallback, TrainerCallback

from benchmarks.calibration_populations import Pool
from examples.interference.task import correct, make_prompts
from examples.interference.train import train
from examples.interference.warm_start import warm_start
from passk_guard.probe.records import Rollouts
from passk_guard.probe.samplers import GenerateSampler
from passk_guard.probe.verifier import Verifier
from passk_guard.sketch import ScoreSketcher, token_batches

PROMPTS, SAMPLES, DIM = 384, 64, 512
TOKENS = 6144  # of one pass


def pools(cache: Path, seed: int, at_steps: tuple[int, ...]) -> dict[str, Pool]:
    """A pool before the first of these optimizer steps of GRPO on pass@8, and before each of the others."""
    found: dict[str, Pool] = {}
    model_dir = warm_start(cache, seed)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    class Collect(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step in at_steps:
                found[f"step {state.global_step}"] = pool(model, tokenizer, seed)

    def prepare(trainer) -> None:
        trainer.add_callback(Collect())
        trainer.remove_callback(PrinterCallback)

    with tempfile.TemporaryDirectory() as folder:
        train(
            model_dir,
            folder,
            steps=max(at_steps) + 1,
            k=8,
            seed=seed,
            prepare=prepare,
            report_to=[],
            disable_tqdm=True,
        )
    return found


def pool(model: PreTrainedModel, tokenizer, seed: int) -> Pool:
    """64 completions of each of 384 prompts, and their score vectors in a fixed projection to 512 dimensions.

    The projection is part of the population: its truth is taken in the same 512 dimensions.
    """
    rows = make_prompts("test", PROMPTS, seed)
    sampler = GenerateSampler(model, tokenizer, max_new_tokens=5, batch_size=2048)
    with torch.random.fork_rng(devices=[]):
        samples = sampler.sample(rows, SAMPLES, seed)
    repeated = [row for row in rows for _ in range(SAMPLES)]
    rollouts = Rollouts(
        rows=repeated,
        prompt_index=[i for i in range(PROMPTS) for _ in range(SAMPLES)],
        prompt_ids=samples.prompt_ids,
        completion_ids=samples.completion_ids,
        completions=samples.completions,
        num_prompts=PROMPTS,
        temperature=1.0,
    )
    right = Verifier(correct).score(rollouts).correct.view(PROMPTS, SAMPLES)
    sketcher = ScoreSketcher(model, DIM, "countsketch")
    scores = torch.zeros(PROMPTS * SAMPLES, DIM)
    slots = list(range(len(scores)))
    for batch in token_batches(
        samples.prompt_ids, samples.completion_ids, slots, max_tokens=TOKENS, pad_token_id=0, device="cpu"
    ):
        own = batch.slots
        local = torch.arange(len(own))
        scores[own] = sketcher.sketch(batch.input_ids, batch.attention_mask, batch.completion_mask, local, len(own))
    scores = scores.view(PROMPTS, SAMPLES, DIM)
    return Pool(scores - scores.mean(1, keepdim=True), (right == 1).to(torch.int8))
