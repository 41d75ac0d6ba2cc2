"""What projecting costs: steps with and without it, alternating in one run, on one process, ZeRO-2 and ZeRO-3.

    python -m benchmarks.projection_cost [--steps 40]

A Qwen2-type model of 6.5M parameters, batch 8 x 128 tokens a rank, AdamW; ZeRO on two processes. Every other step is
guarded, with a direction harvested once, so the ratio is of medians over neighbouring steps: "step" is guarded over
unguarded when no probe runs. "probe" is one refresh (16 prompts x 8 samples of 16 tokens: sampling, sketch and
direction) in unguarded steps. "memory" is what the protected direction takes on each rank.
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

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Trainer, TrainerCallback, TrainingArguments

from passk_guard import GuardConfig, PassKGuardCallback
from tests.tiny import probe_rows, tiny_tokenizer

VOCAB, TOKENS, BATCH = 8192, 128, 8


class Alternate(TrainerCallback):
    """Guards every other step, and times both kinds."""

    def __init__(self, guard: PassKGuardCallback) -> None:
        self.guard, self.seconds = guard, {True: [], False: []}

    def on_step_begin(self, args, state, control, **_):
        self.guarded = state.global_step % 2 == 1
        self.guard._mitigator.steps.open = self.guarded
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if state.global_step > 4:  # warm-up
            self.seconds[self.guarded].append(time.perf_counter() - self.began)


def half_right(completions, **_):
    return [float(i % 2) for i in range(len(completions))]


def build(folder: str, stage: int | None, steps: int) -> Trainer:
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
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, VOCAB, (BATCH * steps, TOKENS), generator=generator).tolist()
    engine = {"use_cpu": True}
    if stage is not None:
        engine = {
            "deepspeed": {
                "zero_optimization": {"stage": stage},
                "train_micro_batch_size_per_gpu": BATCH,
                "gradient_clipping": 1.0,
            }
        }
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
    stage = int(engine[4:]) if engine.startswith("zero") else None
    settings = {"k": 4, "num_samples": 8, "probe_prompts": 16, "refresh_steps": 10**6, "probe_max_new_tokens": 16}
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(folder, stage, steps)
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
    print(f"{'engine':8} {'ranks':>5} {'step':>7} {'probe':>7} {'memory':>9} {'bytes/parameter':>16}")
    for engine, ranks in (("plain", 1), ("zero2", 2), ("zero3", 2)):
        r = start(engine, given.steps)
        share = r["bytes"] / r["parameters"]
        print(f"{engine:8} {ranks:5} {r['step']:6.3f}x {r['probe']:6.1f}x {r['bytes'] / 2**20:6.1f}MiB {share:16.2f}")


if __name__ == "__main__":
    main()
