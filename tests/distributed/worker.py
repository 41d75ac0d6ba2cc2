"""One rank of several runs: `python -m tests.distributed.worker SCENARIO[,SCENARIO] FOLDER`."""

import hashlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from passk_guard import GuardConfig, PassKGuardCallback
from passk_guard.probe.samplers import Samples
from tests.distributed.launch import leave
from tests.helpers.tiny import digit_reward, probe_rows, tiny_grpo_trainer, tiny_lm_trainer, tiny_model
from tests.helpers.tools import Counter, chat_probe, tool_trainer

RANK = int(os.environ.get("RANK", 0))
CONFIG = {"k": 4, "num_samples": 8, "probe_prompts": 11, "refresh_steps": 1, "patience": 1, "sketch_dim": 1024}


class SameEverywhere:
    """Completions that depend on the prompt alone, so that any number of ranks samples the same ones."""

    temperature = 1.0

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def check_lengths(self, rows):
        pass

    def sample(self, rows, num_samples, seed):
        prompts, completions = [], []
        for row in rows:
            bits = hashlib.sha256(row["prompt"].encode()).digest()
            completions += ["7a" if bits[i] % 3 else "ab" for i in range(num_samples)]
            prompts += [self.tokenizer(row["prompt"])["input_ids"]] * num_samples
        return Samples(prompts, [self.tokenizer(c)["input_ids"] for c in completions], completions)


def weights(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().double().tolist() for name, p in model.named_parameters()}


def noted_windows(guard):
    """What each window of this guard will say, as it ends: only the first rank writes a journal.

    Returns:
        A list that fills up with the two ends, the reason of a failure, all numbers of the log row, and [m] changes.
    """
    found, look = [], guard._change.look

    def noting(*given):
        window = look(*given)
        if window is not None:
            changes = None if window.estimate is None else window.estimate.per_prompt.tolist()
            ends = {"since": window.began, "step": window.ended, "remark": window.reason}
            found.append(ends | {"numbers": window.metrics, "per_prompt": changes})
        return window

    guard._change.look = noting
    return found


def change_of(guard):
    """All that the windows of this guard add up to."""
    return asdict(guard.memory.change)


def report(guard, trainer):
    estimate = guard.estimate
    return {
        "change": change_of(guard),
        "status": estimate and estimate.status,
        "inner_product": estimate and estimate.inner_product,
        "gram": guard.memory.history[-1].gram.tolist() if guard.memory.history else None,
        "num_correct": guard.memory.history[-1].num_correct.tolist() if guard.memory.history else None,
    }


def bit_for_bit(folder, guarded, **config):
    trainer = tiny_grpo_trainer(
        folder, model=tiny_model(attention_dropout=0.2), max_steps=3, gradient_accumulation_steps=2
    )
    guard = None
    if guarded:
        guard = PassKGuardCallback(trainer, probe_rows(), digit_reward, GuardConfig(**(CONFIG | config)))
        trainer.add_callback(guard)
    trainer.train()
    rows = [{k: r[k] for k in ("loss", "grad_norm", "reward")} for r in trainer.state.log_history if "loss" in r]
    return {"weights": weights(trainer), "rows": rows, "rng": torch.get_rng_state().tolist()} | (
        report(guard, trainer) | {"hold": guard.memory.hold and asdict(guard.memory.hold)} if guard else {}
    )


class Shift(TrainerCallback):
    """Moves the policy after each step, alike on every rank."""

    def on_step_end(self, args, state, control, model, **_):
        generator = torch.Generator().manual_seed(state.global_step)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator))


def same_everywhere(folder, steps=2, **config):
    trainer = tiny_lm_trainer(folder, max_steps=steps, learning_rate=0.0)
    sampler = SameEverywhere(trainer.processing_class)
    guard = PassKGuardCallback(trainer, probe_rows(), digit_reward, GuardConfig(**(CONFIG | config)), sampler)
    trainer.add_callback(guard)
    trainer.add_callback(Shift())
    windows = noted_windows(guard)
    trainer.train()
    return report(guard, trainer) | {"kept": guard._keeper.metrics(), "windows": windows}


class Uneven(TrainerCallback):
    """The second rank trains on more tokens than the first."""

    def __init__(self, guard):
        self.guard = guard

    def on_step_end(self, args, state, control, **_):
        self.guard._meter.run += 100 * RANK


def budget(folder):
    trainer = tiny_lm_trainer(folder, max_steps=12, learning_rate=0.0)
    config = GuardConfig(**CONFIG | {"refresh_steps": None, "overhead": 5.0})
    guard = PassKGuardCallback(trainer, probe_rows(), digit_reward, config, SameEverywhere(trainer.processing_class))
    trainer.add_callback(guard)
    trainer.add_callback(Uneven(guard))
    trainer.train()
    return asdict(guard.memory.account)


class World(Counter):
    """Cannot be reset for the probe on the second rank the 25th time: in the second refresh."""

    resets = 0

    def reset(self, probe=False, **row):
        World.resets += probe
        if probe and RANK == 1 and World.resets == 25:
            raise OSError("no world")
        return super().reset(**row)


def environments(folder, guarded, **args):
    World.resets = Counter.closed = 0
    trainer = tool_trainer(folder, pytest.MonkeyPatch(), environment_factory=World, reward_funcs=[], **args)
    guard = None
    if guarded:
        settings = {"k": 2, "num_samples": 4, "probe_prompts": 12, "refresh_steps": 1, "sketch_dim": 512}
        guard = PassKGuardCallback(trainer, chat_probe(12, probe=True), "World", GuardConfig(**settings))
        trainer.add_callback(guard)
    trainer.train()
    rows = [{k: r[k] for k in ("loss", "grad_norm", "reward")} for r in trainer.state.log_history if "loss" in r]
    found = {"weights": weights(trainer), "rows": rows, "closed": Counter.closed}
    found["engine"] = str(trainer.accelerator.distributed_type)
    return found | (report(guard, trainer) | refreshes(guard) if guard else {})


def refreshes(guard):
    return {"samples": [int(probe.num_samples.sum()) for probe in guard.memory.history]}


def on_zero2(folder, guarded):
    """`environments` with the optimizer's state and the gradients in parts over the ranks."""
    AcceleratorState._reset_state(reset_partial_state=True)
    chosen = {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "2", "GRADIENT_CLIPPING": "1.0"}  # as accelerate launch
    os.environ.update({f"ACCELERATE_{name}": value for name, value in chosen.items()})
    return environments(folder, guarded, use_cpu=False, ddp_backend="gloo", optim="adamw_torch")


SCENARIOS = {
    "lonely": lambda folder: environments(folder, False),
    "environments": lambda folder: environments(folder, True),
    "lonely_zero2": lambda folder: on_zero2(folder, False),
    "environments_zero2": lambda folder: on_zero2(folder, True),
    "budget": budget,
    "without": lambda folder: bit_for_bit(folder, False),
    "with": lambda folder: bit_for_bit(folder, True),
    "with_training_batch": lambda folder: bit_for_bit(folder, True, source="training_batch", num_samples=4),
    "hold": lambda folder: bit_for_bit(folder, True, mitigation="hold"),
    "metric": lambda folder: bit_for_bit(folder, True, mitigation="hold", hold_metric="digit_reward"),
    "same_everywhere": lambda folder: same_everywhere(folder, steps=4, min_effective_samples=0.01),
    "resampled": lambda folder: same_everywhere(folder, resample_refreshes=3, min_effective_samples=1.0),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    found = {name: SCENARIOS[name](folder / name) for name in sys.argv[1].split(",")}
    (folder / f"rank{RANK}.json").write_text(json.dumps(found))
    leave()
