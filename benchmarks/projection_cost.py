"""What projecting costs: steps with and without it, alternating in one run, on one process, ZeRO-2 and ZeRO-3.

    python -m benchmarks.projection_cost [--steps 40]

A Qwen2-type model of 6.5M parameters, batch 8 x 128 tokens a rank, AdamW; ZeRO on two processes. Every other step is
guarded, with a direction harvested once, so the ratio is of medians over neighbouring steps: "step" is guarded over
unguarded when no probe runs, by the clock on the wall; "cpu" the same in processor time of rank 0, which other
processes disturb less; "guard" the processor time inside the guard over that of an unguarded step, the part of "cpu"
that is not noise. "bound" is the share of guarded steps whose gradient was turned, "probe" one refresh (16 prompts x
8 samples of 16 tokens: sampling, sketch and direction) in unguarded steps, "memory" what the protected direction takes
on each rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Trainer, TrainerCallback, TrainingArguments

from passk_guard import GuardConfig, PassKGuardCallback
from tests.helpers.tiny import probe_rows, tiny_tokenizer

VOCAB, TOKENS, BATCH = 8192, 128, 8


def finish_kernels() -> None:
    """Wait for what a GPU has been given to do, so that the clock counts it where it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Alternate(TrainerCallback):
    """Guards every other step, and times both kinds."""

    def __init__(self, guard: PassKGuardCallback) -> None:
        self.guard = guard
        self.seconds, self.cpu = {True: [], False: []}, {True: [], False: []}
        self.inside: list[float] = []
        self.bound: list[bool] = []

    def listen(self) -> None:
        """Time what the guard does before each step."""
        steps = self.guard._mitigator.steps
        project = steps._project

        def timed(protected):
            before, began = steps._sums.get("mitigated", 0.0), time.process_time()
            project(protected)
            self.inside.append(time.process_time() - began)
            self.bound.append(steps._sums["mitigated"] > before)

        steps._project = timed

    def on_step_begin(self, args, state, control, **_):
        self.guarded = state.global_step % 2 == 1
        self.guard._mitigator.steps.open = self.guarded
        if state.global_step == 4:
            self.listen()
        finish_kernels()
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **_):
        finish_kernels()
        if state.global_step > 4:  # warm-up
            self.seconds[self.guarded].append(time.perf_counter() - self.began[0])
            self.cpu[self.guarded].append(time.process_time() - self.began[1])


def half_right(completions, **_):
    return [float(i % 2) for i in range(len(completions))]


def small_model() -> torch.nn.Module:
    """6.5M parameters with random weights."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def zero(stage: int) -> dict[str, Any]:
    """The TrainingArguments of a ZeRO stage."""
    return {
        "deepspeed": {
            "zero_optimization": {"stage": stage},
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_clipping": 1.0,
        }
    }


def build(folder: str, model: Any, steps: int, tokens: int = TOKENS, **engine: Any) -> Trainer:
    """A trainer on random tokens; `engine` are further TrainingArguments."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, model.config.vocab_size, (BATCH * steps, tokens), generator=generator).tolist()
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        optim="adamw_torch",
        **engine,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model, arguments, train_dataset=data, processing_class=tiny_tokenizer())


def measure(engine: str, steps: int) -> dict[str, float]:
    options = zero(int(engine[4:])) if engine.startswith("zero") else {"use_cpu": True}
    with tempfile.TemporaryDirectory() as folder:
        return measured(build(folder, small_model(), steps, **options))


def measured(trainer: Trainer) -> dict[str, float]:
    """Train, every other step guarded, and compare the two kinds of step."""
    settings = {"k": 4, "num_samples": 8, "probe_prompts": 16, "refresh_steps": 10**6, "probe_max_new_tokens": 16}
    config = GuardConfig(mitigation="project", gate="always", **settings)
    guard = PassKGuardCallback(trainer, probe_rows(), half_right, config)
    trainer.add_callback(guard)
    clock = Alternate(guard)
    trainer.add_callback(clock)
    kept = {}

    class Weigh(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            parts = guard._mitigator.steps.protected
            kept["bytes"] = sum(part.numel() * part.element_size() for part in parts)

    trainer.add_callback(Weigh())
    trainer.train()
    plain = statistics.median(clock.seconds[False])
    probe = next(r["passk_guard/probe_seconds"] for r in trainer.state.log_history if "passk_guard/probe_seconds" in r)
    return {
        "step": statistics.median(clock.seconds[True]) / plain,
        "cpu": statistics.median(clock.cpu[True]) / statistics.median(clock.cpu[False]),
        "guard": statistics.median(clock.inside) / statistics.median(clock.cpu[False]),
        "bound": statistics.mean(clock.bound),
        "seconds": plain,
        "probe": probe / plain,
        "bytes": kept["bytes"],
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters()),
    }


def start(engine: str, steps: int) -> dict[str, float]:
    """A fresh start of the processes of one engine."""
    ranks = 1 if engine == "plain" else 2
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += ["-m", "benchmarks.projection_cost", "--engine", engine, "--steps", str(steps), "--out", str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not out.exists():
            sys.exit(done.stderr[-4000:])
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine:
        torch.set_num_threads(1)
        result = measure(given.engine, given.steps)
        if int(os.environ.get("RANK", 0)) == 0:
            given.out.write_text(json.dumps(result))
        return
    print("| engine | ranks | step | cpu | guard | bound | probe | memory, MiB | bytes/parameter |")
    print("|---|---|---|---|---|---|---|---|---|")
    for engine, ranks in (("plain", 1), ("zero2", 2), ("zero3", 2)):
        r = start(engine, given.steps)
        cost = f"{r['step']:.3f} | {r['cpu']:.3f} | {r['guard']:.4f} | {r['bound']:.2f} | {r['probe']:.1f}"
        memory = f"{r['bytes'] / 2**20:.1f} | {r['bytes'] / r['parameters']:.2f}"
        print(f"| {engine} | {ranks} | {cost} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
