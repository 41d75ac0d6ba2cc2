"""GRPO on pass@k with TRL, and an evaluation that leaves the run as it found it.

    python -m examples.interference.train [--seed 0] [--floor 0.5] [--cap 2] [--k 8]

prints exact pass@1 and pass@k on held-out prompts before and after.

Left out: vLLM, checkpoints, several epochs over the same samples, a KL penalty. One step samples 512 completions
(32 prompts x 16), takes one SGD step on them and throws them away, so the update is the plain policy gradient.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from passk_guard.mitigation.objective import PassKObjective

from .exact import Rows, evaluate, gradient_cosine
from .task import MIXTURE, correct, make_prompts
from .warm_start import warm_start

PROMPTS_PER_STEP, SAMPLES_PER_PROMPT = 32, 16


def make_config(output_dir: str | Path, *, steps: int, seed: int, **overrides: object) -> GRPOConfig:
    """The settings of the run; `overrides` are any GRPOConfig fields.

    TRL's "dr_grpo" loss divides the sum over tokens by `max_completion_length`, 5: a learning rate of 0.075 here is
    one of 0.015 on grad J_k itself. ("grpo" divides by each completion's own length, which is 5 for nearly all.)
    """
    settings = {
        "max_steps": steps,
        "seed": seed,
        "per_device_train_batch_size": PROMPTS_PER_STEP * SAMPLES_PER_PROMPT,
        "num_generations": SAMPLES_PER_PROMPT,
        "max_completion_length": 5,  # four digits and end-of-sequence
        "temperature": 1.0,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",  # dividing by the group's deviation would cancel the pass@k weights
        "beta": 0.0,
        "optim": "sgd",
        "learning_rate": 0.075,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,  # off: clipping would change the length of the steps that are compared
        "logging_steps": 1,
        "report_to": "tensorboard",
        "save_strategy": "no",
        # For speed on a CPU: the model is tiny and float32, there is nothing to save memory on.
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return GRPOConfig(output_dir=str(output_dir), **(settings | overrides))


def build_trainer(
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    steps: int = 60,
    seed: int = 0,
    mixture: dict[str, float] = MIXTURE,
    cue: bool = True,
    **overrides: object,
) -> GRPOTrainer:
    """TRL's GRPOTrainer on the interference task, with its own advantages: install `PassKObjective` for pass@k."""
    config = make_config(output_dir, steps=steps, seed=seed, **overrides)
    size = steps * config.per_device_train_batch_size // config.num_generations
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir),
        reward_funcs=[correct],
        args=config,
        train_dataset=Dataset.from_list(make_prompts("train", size, seed, mixture, cue=cue)),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )


class ExactEvaluation(TrainerCallback):
    """Exact pass@1, pass@k and, with `cosine`, gradient cosine on `rows`, at the start and every few steps.

    Nothing is sampled, no mode is changed and no `.grad` is touched: the run is the same with and without it.

    Attributes:
        records: one dict per evaluation: `step`, `pass_at_1`, `pass_at_8`, `cosine`, `easy/pass_at_1`, ...
    """

    def __init__(self, trainer: GRPOTrainer, rows: Rows, *, k: int = 8, every: int = 5, cosine: bool = True) -> None:
        self.trainer, self.rows, self.k, self.every, self.cosine = trainer, rows, k, every, cosine
        self.records: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, **_):
        self.trainer.log(self._measure(state.global_step))

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            # TRL averages what it finds here into the step's own log row; calling log() now would flush that row.
            for name, value in self._measure(state.global_step).items():
                self.trainer._metrics["train"][name].append(value)

    def _measure(self, step: int) -> dict[str, float]:
        model, tokenizer = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.processing_class
        values = evaluate(model, tokenizer, self.rows, self.k)
        if self.cosine:
            values["cosine"] = gradient_cosine(model, tokenizer, self.rows, [self.k])[self.k]
        self.records.append({"step": step, **values})
        return {f"exact/{name}": value for name, value in values.items()}


def train(
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    steps: int = 60,
    k: int = 8,
    seed: int = 0,
    evaluate_every: int = 5,
    cosine: bool = True,
    prepare: Callable[[GRPOTrainer], None] = lambda trainer: None,
    objective: Callable[..., PassKObjective] = PassKObjective,
    floor: float | None = None,
    cap: float | None = None,
    mixture: dict[str, float] = MIXTURE,
    cue: bool = True,
    **overrides: object,
) -> tuple[GRPOTrainer, list[dict[str, float]]]:
    """One GRPO run on pass@k from a warm-started model.

    Args:
        cosine: whether the evaluation takes the angle of the gradients too, which is four fifths of its cost.
        prepare: called with the trainer before it starts; the place to add callbacks, such as the guard.
        objective: makes what gives the trainer its advantages, from the trainer, k, floor and cap.
        floor, cap: bounds on the weight of a prompt.
        mixture, cue: of the prompts, in training and in the evaluation, as in `make_prompts`.
        overrides: any GRPOConfig fields.

    Returns:
        The trainer (its logs in `trainer.state.log_history`) and the records of `ExactEvaluation` on 768 test prompts.
    """
    trainer = build_trainer(model_dir, output_dir, steps=steps, seed=seed, mixture=mixture, cue=cue, **overrides)
    test = make_prompts("test", 768, seed=0, mixture=mixture, cue=cue)
    evaluation = ExactEvaluation(trainer, test, k=k, every=evaluate_every, cosine=cosine)
    trainer.add_callback(evaluation)
    prepare(trainer)
    with objective(trainer, k=k, floor=floor, cap=cap):
        trainer.train()
    return trainer, evaluation.records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default in (
        ("seed", int, 0),
        ("steps", int, 60),
        ("k", int, 8),
        ("floor", float, None),
        ("cap", float, None),
        ("learning_rate", float, 0.02),
        ("cache", Path, Path("runs/warm_start")),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default)
    given = vars(parser.parse_args())
    model_dir = warm_start(given.pop("cache"), given["seed"])
    with tempfile.TemporaryDirectory() as folder:
        _, records = train(
            model_dir,
            folder,
            **given,
            report_to=[],
            disable_tqdm=True,
            prepare=lambda trainer: trainer.remove_callback(PrinterCallback),
        )
    for name in ("pass_at_1", f"pass_at_{given['k']}"):
        start, end = records[0][name], records[-1][name]
        print(f"{name:10} {start:.3f} -> {end:.3f} ({end - start:+.3f})")


if __name__ == "__main__":
    main()
