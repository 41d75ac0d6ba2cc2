"""Runs with the same result whether or not they were killed and resumed, on any engine."""

import gc
import hashlib
import json
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from passk_guard import GuardConfig, PassKGuardCallback, PassKObjective
from passk_guard.reporting.journal import read_journal
from tests.callback.test_guard import FixedSampler
from tests.helpers.killing import Last
from tests.helpers.tiny import digit_reward, probe_rows, tiny_grpo_trainer, tiny_lm_trainer, tiny_model, tiny_rows

GUARD = {"k": 4, "num_samples": 8, "probe_prompts": 30, "refresh_steps": 3, "patience": 1, "cooldown": 2}
GUARD |= {"sketch_dim": 512, "probe_max_new_tokens": 4, "pool_refreshes": 3, "threshold": 0.0}
PLANTED = {"num_samples": 16, "probe_prompts": 90}
# A cosine that random models do not reach by themselves, so that steps are turned.
PROJECT = {"mitigation": "project", "gamma": 0.9, "advanced": {"protected_average": 0.5}}
GATED = PROJECT | {"gate": "conflict", "pool_refreshes": 1} | PLANTED
REWEIGHT = {"mitigation": "reweight", "floor_gamma": 0.99, "floor_max": 4.0}
BATCH = {"source": "training_batch"}
MODES = {
    "unguarded": None,
    "observe": {},
    "alert": PLANTED | {"patience": 2},
    "project": PROJECT,
    "gated": GATED,
    "reweight": REWEIGHT | PLANTED,
    "both": GATED | REWEIGHT | {"mitigation": "both"},
    "batch": BATCH,
    "batch_reweight": BATCH | REWEIGHT,
}
"""Settings of the guard; those of `PLANTED` have a probe in conflict, see `_tag`."""
TIMES = ("time", "probe_seconds", "step_seconds", "mitigation_seconds")
STEPS = 10
LULL = range(6, 9)
"""Steps at which a planted probe is not in conflict."""


@cache
def ready(engine="plain"):
    """Import what every attempt needs, once before the forks, and hide it from the garbage collector.

    DeepSpeed's operator is built here: a process that is killed meanwhile leaves a lock for which all later ones wait.
    """
    import trl.trainer.grpo_trainer  # noqa: F401
    from deepspeed.comm.torch import build_shm_op

    if engine.startswith("zero"):
        build_shm_op()
    gc.collect()
    gc.freeze()


def settings(engine):
    """Checkpoints every 2 steps, rows and refreshes every 3, so that rows and refreshes span a checkpoint."""
    common = {"max_steps": STEPS, "gradient_accumulation_steps": 2, "logging_steps": 3, "learning_rate": 1e-2}
    common |= {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.5, "optim": "adamw_torch"}
    if not engine.startswith("zero"):
        return common
    return common | {
        "deepspeed": {
            "zero_optimization": {"stage": int(engine[4:]), "stage3_param_persistence_threshold": 60},
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        },
    }


def run(kind, engine, mode, folder, resume, executioner, *, guard=None, **changes):
    """One attempt at one run, and its result.

    Args:
        kind: "lm" or "grpo".
        engine: "plain", "ddp", "zero2" or "zero3".
        mode: of `MODES`.
        resume: checkpoint to resume from, or None.
        guard, changes: of the guard's and of the trainer's settings.
    """
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    model = tiny_model(attention_dropout=0.1, initializer_range=0.2)
    make = _grpo if kind == "grpo" else tiny_lm_trainer
    extra = {"reward_funcs": executioner.visit(digit_reward)} if kind == "grpo" else {}
    trainer = make(folder, model=model, **(settings(engine) | extra | changes))
    executioner.watch(trainer)
    trainer.add_callback(executioner)
    callback = None
    if MODES[mode] is not None:
        callback = _guard(trainer, executioner, GuardConfig(**(GUARD | MODES[mode] | (guard or {}))))
        trainer.add_callback(callback)
    trainer.add_callback(Last(executioner))
    with PassKObjective(trainer, k=GUARD["k"]) if kind == "grpo" else nullcontext() as objective:
        seen = _Seen(callback, objective)
        trainer.add_callback(seen)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return {
        "weights": weights(trainer),
        "rng": torch.get_rng_state(),
        "memory": None if callback is None else memory_of(callback),
        "seen": seen.steps,
        "projected": sum(bool(row.get("passk_guard/mitigated")) for row in trainer.state.log_history),
    }


def weights(trainer):
    """Every parameter by name, whole."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = dict(model.named_parameters())
    whole = nullcontext()
    if any(hasattr(p, "ds_id") for p in parameters.values()):
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(list(parameters.values()))
    with whole:
        return {name: p.detach().clone() for name, p in parameters.items()}


def memory_of(guard):
    """All that the next verdict depends on, comparable."""
    memory = guard.memory
    names = ("decision", "evidence", "floor", "failures", "step")
    probes = [
        (p.gram.tolist(), p.num_samples.tolist(), p.num_correct.tolist(), list(p.prompt_keys)) for p in memory.history
    ]
    return {name: getattr(memory, name) for name in names} | {"history": probes}


def events(folder):
    """The events of a run without their times."""
    return [{k: v for k, v in e.items() if k not in TIMES} for e in read_journal(folder).events]


def raw_lines(folder):
    """Lines of the journal, each of which must be JSON."""
    return [json.loads(line) for line in (Path(folder) / "passk_guard.jsonl").read_text().splitlines()]


def same_weights(left, right):
    """Bit for bit."""
    return all(torch.equal(left["weights"][name], right["weights"][name]) for name in left["weights"])


def same_steps(whole, cut):
    """At the steps of the last attempt the guard was in the state of the uninterrupted run."""
    return len(cut["seen"]) > 0 and cut["seen"] == whole["seen"][-len(cut["seen"]) :]


def put_to_work(mode, whole):
    """Assert that the guard did what its mode is for. Equality alone would also hold for a guard that does nothing."""
    steps, done = whole["seen"], (MODES[mode] or {}).get("mitigation")
    projects = done in ("project", "both")
    assert (whole["projected"] > 0) == projects
    assert (len({step["direction"] for step in steps}) > 2) == projects, "taken again at the refreshes"
    assert (len({step["floor"] for step in steps}) > 2) == (done in ("reweight", "both"))
    gates = [step["open"] for step in steps]
    if mode in ("gated", "both"):
        assert gates == [step["step"] not in LULL for step in steps]
    else:
        assert set(gates) == {projects}


def _grpo(folder, prompts=96, **args):
    """A trainer with more prompts than a run needs: TRL's sampler starts the next epoch over after a resume.

    It has groups of eight, four in a step. With fewer the floor of a training batch stays undetermined.
    """
    rows = Dataset.from_list(tiny_rows(prompts))
    settings = {"scale_rewards": "none", "loss_type": "dr_grpo", "num_generations": 8}
    settings |= {"per_device_train_batch_size": 16}
    return tiny_grpo_trainer(folder, train_dataset=rows, **(settings | args))


def _guard(trainer, executioner, config):
    if config.source == "training_batch":
        return PassKGuardCallback(trainer, None, trainer.reward_funcs[0], config)
    if config.probe_prompts != PLANTED["probe_prompts"]:
        return PassKGuardCallback(trainer, probe_rows(), executioner.visit(digit_reward), config)
    rows = [{"prompt": f"{i:02d}=", "wanted": "letter" if i % 7 else "digit"} for i in range(100)]
    sampler = FixedSampler(trainer.processing_class, lambda row: 0.1)
    return PassKGuardCallback(trainer, rows, executioner.visit(_tag), config, sampler)


def _tag(completions, wanted, trainer_state, **_):
    """One prompt in seven wants a digit and the others a letter, which no model could know; not in the lull."""
    if trainer_state.global_step in LULL:
        wanted = ["digit"] * len(completions)
    return [float(c.isdigit() == (w == "digit")) for c, w in zip(completions, wanted, strict=True)]


class _Seen(TrainerCallback):
    """The state of the guard at each step, from behind it in the list of callbacks."""

    def __init__(self, guard, objective):
        self.guard, self.objective, self.steps = guard, objective, []

    def on_step_begin(self, args, state, control, **kwargs):
        floor = None if self.objective is None else self.objective.floor
        steps = None if self.guard is None else self.guard._mitigator.steps
        direction = None if steps is None or steps.protected is None else _fingerprint(steps.protected)
        gate = steps is not None and steps.open
        self.steps.append({"step": state.global_step, "floor": floor, "open": gate, "direction": direction})


def _fingerprint(tensors):
    return hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)).hexdigest()
