"""One rank of runs on one engine: `python -m tests.distributed.projection_worker ENGINE FOLDER`."""

import json
import os
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from passk_guard import GuardConfig, PassKGuardCallback
from passk_guard.mitigation.protected_direction import Pass1Loss
from tests.distributed.launch import leave
from tests.distributed.worker import SameEverywhere, change_of, noted_windows
from tests.helpers.tiny import digit_reward, probe_rows, tiny_lm_trainer, tiny_model
from tests.mitigation.engines.native_worker import shard, weights_of

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
GUARD = {"k": 4, "num_samples": 8, "probe_prompts": 11, "refresh_steps": 2, "patience": 1, "sketch_dim": 1024}
PROJECT = GUARD | {"mitigation": "project", "gate": "always", "gamma": 0.9, "max_probe_tokens": 64}

REUSE = {"refresh_steps": 1, "resample_refreshes": 4, "min_effective_samples": 0.01}
GUARDS = {"project": PROJECT, "observe": GUARD, "rank_1_fails": PROJECT}
HELD_ON = ("ddp", "zero2")  # the coefficient alone is another than that of the projection
HELD = {"mitigation": "hold", "probe_prompts": 20, "min_effective_samples": 0.01, "max_probe_tokens": 64}
GUARDS |= {"hold": GUARD | HELD, "reuse": PROJECT | REUSE, "observe_reuse": GUARD | REUSE}


def deepspeed_config(stage):
    return {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
    }


def arguments(engine):
    """All ranks together take four samples a step, or each takes all four of them.

    Under DeepSpeed on a CPU accelerate 1.15 gives each rank the whole batch, 1.4 its part of one that is split.
    """
    common = {"max_steps": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "learning_rate": 1e-2}
    common |= {"lr_scheduler_type": "constant", "optim": "adamw_torch", "adam_epsilon": 1e-3}
    if engine.startswith("zero"):
        split = {"accelerator_config": {"split_batches": True}}
        return common | split | {"deepspeed": deepspeed_config(int(engine[4:])), "use_cpu": False}
    return common | {"per_device_train_batch_size": 4 // RANKS}


def gathered(parameters):
    """A context in which every rank holds the whole parameters, also under ZeRO-3."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def weights(trainer):
    if is_sharded(trainer.model):
        return weights_of(trainer)
    parameters = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    with gathered(list(parameters.values())):
        return {name: p.detach().double().tolist() for name, p in parameters.items()}


def is_sharded(model):
    return isinstance(model, FSDPModule)


@contextmanager
def harvest_failing_on_rank_1():
    """One rank's loss raises on every batch, but for the filler that keeps ranks in step."""
    original = Pass1Loss.__call__

    def broken(self, model, batch):
        if RANK == 1 and bool((batch.slots >= 0).any()):
            raise MemoryError("rank 1 has no room")
        return original(self, model, batch)

    Pass1Loss.__call__ = broken
    try:
        yield
    finally:
        Pass1Loss.__call__ = original


def run(engine, variant, folder):
    """Train once and describe the result."""
    model = tiny_model(initializer_range=0.1)
    if engine == "fsdp2":
        model = shard(model)
    trainer = tiny_lm_trainer(folder / f"rank{RANK}", model=model, **arguments(engine))
    guard, windows = None, []
    if variant != "without":
        config = GuardConfig(**GUARDS[variant])
        sampler = SameEverywhere(trainer.processing_class)
        guard = PassKGuardCallback(trainer, probe_rows(), digit_reward, config, sampler)
        trainer.add_callback(guard)
        windows = noted_windows(guard)
    with harvest_failing_on_rank_1() if variant == "rank_1_fails" else nullcontext():
        trainer.train()
    rows = [row for row in trainer.state.log_history if "passk_guard/mitigated" in row]
    newest = guard.memory.history[-1] if guard and guard.memory.history else None
    return {
        "weights": weights(trainer),
        "mitigated": [row["passk_guard/mitigated"] for row in rows],
        "train_cosine": [row["passk_guard/train_cosine"] for row in rows],
        "failures": guard.memory.failures if guard else 0,
        "gram": guard.memory.history[0].gram.tolist() if guard and guard.memory.history else None,
        "newest_gram": newest and newest.gram.tolist(),
        "misses": newest.misses.tolist() if newest and newest.reused else None,
        "kept": guard._keeper.metrics() if guard else {},
        "windows": windows,
        "change": guard and change_of(guard),
        "hold": guard and guard.memory.hold and asdict(guard.memory.hold),
        "steps": trainer.state.global_step,
    }


def run_all(engine, folder):
    """One start of the processes for all runs: starting them takes longer than running."""
    results = {}
    for variant in ("without", *GUARDS):
        if variant == "hold" and engine not in HELD_ON:
            continue
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state()
        results[variant] = run(engine, variant, folder / variant)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[2])
    if sys.argv[1] == "fsdp2":
        dist.init_process_group("gloo")
    result = run_all(sys.argv[1], target)
    (target / f"rank{RANK}.json").write_text(json.dumps(result))
    leave()
