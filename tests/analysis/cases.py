"""Tiny checkpoints, probes and samplers for the tests of `analyze`."""

from __future__ import annotations

import hashlib
import json

import torch

from passk_guard.analysis import Settings, analyze
from passk_guard.analysis.results import Sketch
from passk_guard.analysis.run import Measured, conclude
from passk_guard.cli import main
from passk_guard.estimation.records import ProbeGram
from passk_guard.probe.prompts import ProbeSet
from passk_guard.probe.refresh import Refresh
from passk_guard.probe.samplers import Samples
from tests.helpers.populations import draw, population
from tests.helpers.tiny import digit_reward, probe_rows, tiny_model, tiny_tokenizer

QUICK = {"ks": (1, 2, 4), "num_samples": 8, "max_new_tokens": 4, "batch_size": 32, "sketch_dim": 1024}


class PromptSampler:
    """Completions that depend on the prompt alone; counts what it is asked for and can stop like Ctrl-C."""

    temperature = 1.0

    def __init__(self, tokenizer=None, stop_after=None):
        self.tokenizer = tokenizer or tiny_tokenizer()
        self.stop_after, self.sampled = stop_after, []

    def check_lengths(self, rows):
        pass

    def sample(self, rows, num_samples, seed):
        if self.stop_after is not None and len(self.sampled) >= self.stop_after:
            raise KeyboardInterrupt
        prompts, completions = [], []
        for row in rows:
            self.sampled.append(row["prompt"])
            bits = hashlib.sha256(str(row["prompt"]).encode()).digest()
            completions += ["7a" if bits[i] % 3 else "ab" for i in range(num_samples)]
            prompts += [self.tokenizer(row["prompt"])["input_ids"]] * num_samples
        return Samples(prompts, [self.tokenizer(c)["input_ids"] for c in completions], completions)


def quick(model=None, *, rows=None, sampler=None, **settings):
    """An analysis of a tiny model with completions that depend on the prompt alone."""
    model = tiny_model() if model is None else model
    sampler = sampler or PromptSampler()
    return analyze(model, tiny_tokenizer(), rows or probe_rows(13), digit_reward, sampler=sampler, **(QUICK | settings))


def save_model(folder, kind="llama"):
    """A checkpoint directory with its tokenizer."""
    tiny_model(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_probe(path, rows=None):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or probe_rows(13)))
    return path


def command(model, probe, out, *more, correct="tests.helpers.tiny:digit_reward"):
    """Run `analyze` as the command line does; returns the exit status."""
    given = ["analyze", str(model), "--probe", str(probe), "--correct", correct, "--out", str(out)]
    given += ["--samples", "8", "--k", "1,2,4", "--max-new-tokens", "4", "--sketch-dim", "1024", *more]
    return main(given)


def compare_command(folder):
    """Run `compare` of the checkpoints "a" and "b" in a folder as the command line does; returns the exit status."""
    given = ["compare", str(folder / "a"), str(folder / "b"), "--prompts", str(folder / "probe.jsonl")]
    given += ["--correct", "tests.helpers.tiny:digit_reward", "--num-samples", "8", "--max-new-tokens", "4"]
    return main([*given, "--batch-size", "16", "--format", "json"])


def synthetic(m, *, cosine=-0.5, text="What is the sum of the first {} odd numbers, and why?", name="m"):
    """An analysis of m prompts with a known angle, without a model."""
    settings = Settings(ks=(1, 2, 4, 8), num_samples=16)
    drawn = draw(population(cosine), m, 16, torch.Generator().manual_seed(0))
    probe = ProbeGram(drawn.gram, drawn.num_samples, drawn.num_correct, range(m))
    refresh = Refresh(probe, None, [], probe.num_samples, probe.num_correct, 8, 1.0)
    sketch = Sketch("kronecker", 16384, 0, "all trainable parameters", 900, 1000, ["gain"])
    prompts = ProbeSet({"prompt": text.format(i)} for i in range(m))
    model = {"name": name, "fingerprint": "f"}
    return conclude(Measured(refresh, sketch, prompts, "right", model, settings))
