"""GRPO on pass@8 with the guard projecting, on whatever engine the accelerate config names. Nothing here depends on it.

    accelerate launch --config_file examples/accelerate_configs/zero2.yaml -m examples.grpo_deepspeed

and the same with ddp.yaml, zero1.yaml, zero3.yaml and, on GPUs, fsdp2.yaml. Without a GPU:

    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
    accelerate launch --config_file examples/accelerate_configs/zero2.yaml -m examples.grpo_deepspeed --ddp_backend gloo
    accelerate launch --config_file examples/accelerate_configs/ddp.yaml -m examples.grpo_deepspeed --use_cpu true

The task is that of examples/interference: a small model that is warm-started on the first process (1-2 minutes, once).
Settings of the guard come from the command line beside TRL's own, e.g. --mitigation off --gamma 0.1 --max_steps 60.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer, TrlParser

from examples.interference.task import correct, make_prompts
from examples.interference.warm_start import warm_start
from passk_guard import GuardConfig, PassKObjective, watch


@dataclass
class Run:
    """What is this example's own."""

    model_dir: str | None = field(default=None, metadata={"help": "A warm-started model; by default one is made."})


DEFAULTS = {
    "output_dir": "runs/grpo_deepspeed",
    "seed": 0,
    "max_steps": 20,
    "per_device_train_batch_size": 64,  # 8 prompts x 16 completions a step on two processes
    "num_generations": 16,
    "max_completion_length": 5,
    "loss_type": "dr_grpo",
    "scale_rewards": "none",
    "beta": 0.0,
    "optim": "adamw_torch",
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "mitigation": "project",
    "probe_prompts": 32,
    "refresh_steps": 5,
}


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("passk_guard").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    parser = TrlParser((Run, GRPOConfig, GuardConfig))
    parser.set_defaults(**DEFAULTS)
    run, args, guard_config = parser.parse_args_and_config()

    with PartialState().main_process_first():
        model_dir = Path(run.model_dir) if run.model_dir else warm_start(Path("runs/warm_start"), args.seed)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir),
        reward_funcs=[correct],
        args=args,
        train_dataset=Dataset.from_list(make_prompts("train", 4096, args.seed)),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    trainer.remove_callback(PrinterCallback)
    probe = make_prompts("probe", 1024, args.seed)
    watch(trainer, probe=probe, correct=correct, config=guard_config)
    with PassKObjective(trainer, k=guard_config.k):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    if trainer.is_world_process_zero():
        report(trainer, guard_config.k)


def report(trainer: GRPOTrainer, k: int) -> None:
    """How often the guard acted, and the pass rates of its probe, first and last."""
    history = trainer.state.log_history
    turned = [row["passk_guard/mitigated"] for row in history if "passk_guard/mitigated" in row]
    print(
        f"{trainer.accelerator.distributed_type} on {trainer.accelerator.num_processes} processes: "
        f"{sum(turned):.0f} of {trainer.state.global_step} steps turned by the guard"
    )
    probed = [row for row in history if "passk_guard/pass_at_1" in row]
    for row in probed[:1] + probed[1:][-1:]:
        rates = [(j, row[f"passk_guard/pass_at_{j}"], row[f"passk_guard/pass_at_{j}_se"]) for j in (1, k)]
        print(f"step {row['step'] - 1:3}: " + ", ".join(f"pass@{j} {rate:.3f} ± {se:.3f}" for j, rate, se in rates))


if __name__ == "__main__":
    main()
