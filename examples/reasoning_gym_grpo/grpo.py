"""One GRPO run on pass@k with the guard attached, observing or guarding.

Left out: vLLM, checkpoints, several epochs over the same samples, a KL penalty.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from examples.interference.report import read_events
from examples.reasoning_gym_grpo.policy import MAX_ANSWER
from examples.reasoning_gym_grpo.tasks import correct, make_rows
from passk_guard import PassKObjective, ProbeSet, watch

ARMS = {"observe": "off", "guarded": "project"}  # the guard's `mitigation`


@dataclass(frozen=True)
class Plan:
    """The size of everything; `Plan()` is the default run, `QUICK` one for tests, too small to show anything."""

    k: int = 8
    warm_steps: int = 1200
    steps: int = 40
    prompts_per_step: int = 64
    samples_per_prompt: int = 16
    learning_rate: float = 5e-5
    probe_prompts: int = 256
    probe_set: int = 1024
    test_prompts: int = 600
    test_samples: int = 32


QUICK = Plan(
    warm_steps=60, steps=6, prompts_per_step=8, probe_prompts=16, probe_set=64, test_prompts=40, test_samples=16
)


class ProgressBar(TrainerCallback):
    """One line for the run, with the newest pass rates of the guard's probe, in place of a line for each step."""

    def __init__(self, title: str, plan: Plan) -> None:
        self.bar, self.shown = tqdm(total=plan.steps, desc=title, disable=None), {}
        self.names = {"probe pass@1": "pass_at_1", f"pass@{plan.k}": f"pass_at_{plan.k}", "cosine": "cosine"}

    def on_log(self, args, state, control, logs=None, **_):
        if "passk_guard/pass_at_1" in logs:  # a row with a refresh; one without a cosine holds no signal
            found = {label: logs.get(f"passk_guard/{name}") for label, name in self.names.items()}
            self.shown = {label: "none" if value is None else f"{value:.3f}" for label, value in found.items()}
        self.bar.set_postfix(self.shown, refresh=False)

    def on_step_end(self, args, state, control, **_):
        self.bar.update()

    def on_train_end(self, args, state, control, **_):
        self.bar.close()


def make_config(output_dir: Path, plan: Plan, seed: int) -> GRPOConfig:
    """TRL's settings; what is not named here is TRL's default, AdamW and clipping at norm 1 among it."""
    return GRPOConfig(
        output_dir=str(output_dir),
        max_steps=plan.steps,
        seed=seed,
        per_device_train_batch_size=plan.prompts_per_step * plan.samples_per_prompt,
        num_generations=plan.samples_per_prompt,
        max_completion_length=MAX_ANSWER,
        loss_type="dr_grpo",
        scale_rewards="none",  # dividing by the group's deviation would cancel the pass@k weights
        beta=0.0,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        # For speed on a CPU: the model is tiny and float32, there is nothing to save memory on.
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )


def run_arm(arm: str, model_dir: Path, out: Path, plan: Plan, seed: int) -> tuple[GRPOTrainer, list[dict]]:
    """Trains from the warm start; the trainer, and the guard's events as its journal holds them."""
    out.mkdir(parents=True, exist_ok=True)
    journal = out / "passk_guard.jsonl"
    journal.unlink(missing_ok=True)  # the guard appends, for runs that are resumed
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir),
        reward_funcs=[correct],
        args=make_config(out, plan, seed),
        train_dataset=Dataset.from_list(make_rows("train", plan.steps * plan.prompts_per_step, seed)),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    probe = ProbeSet.from_list(make_rows("probe", plan.probe_set, seed))
    settings = {"k": plan.k, "mitigation": ARMS[arm], "refresh_steps": 5, "probe_prompts": plan.probe_prompts}
    watch(trainer, probe=probe, correct=correct, **settings)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressBar(f"GRPO on pass@{plan.k}, {arm}", plan))
    with PassKObjective(trainer, k=plan.k):
        trainer.train()
    return trainer, read_events(journal)
