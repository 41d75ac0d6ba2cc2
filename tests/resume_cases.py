"""Runs that must come out the same whether or not they were killed and resumed, on any engine."""

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from passk_guard import GuardConfig, PassKGuardCallback, PassKObjective
from passk_guard.journal_file import read_journal
from tests.killing import Last
from tests.test_callback import FixedSampler
from tests.tiny import digit_reward, probe_rows, tiny_grpo_trainer, tiny_lm_trainer, tiny_model, tiny_rows

GUARD = {"k": 4, "num_samples": 8, "probe_prompts": 11, "refresh_steps": 2, "patience": 1, "cooldown": 2}
GUARD |= {"sketch_dim": 512, "probe_max_new_tokens": 4, "pool_refreshes": 3, "threshold": 0.95}
# A cosine that random models do not reach by themselves, so that something is done.
PROJECT = {"mitigation": "project", "gamma": 0.9, "protected_average": 0.5}
REWEIGHT = {"mitigation": "reweight", "floor_gamma": 0.99, "floor_max": 4.0}
BATCH = {"source": "training_batch", "num_samples": 4}
MODES = {
    "unguarded": None,
    "observe": {},
    "project": PROJECT,
    "gated": PROJECT | {"gate": "conflict", "gate_confidence": 0.6},
    "reweight": REWEIGHT,
    "both": PROJECT | REWEIGHT | {"mitigation": "both"},
    "batch": BATCH,
    "batch_reweight": BATCH | REWEIGHT,
}
TIMES = ("probe_seconds", "step_seconds", "mitigation_seconds")
STEPS = 9


def settings(engine):
    """Log rows every 3 steps and checkpoints every 2, so that a row spans a checkpoint; dropout, momentum, decay."""
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
    """One attempt at one run, and what it came to.

    Args:
        kind: "lm", "grpo", or "conflict": an "lm" whose probe falls into conflict.
        engine: "plain", "ddp", "zero2" or "zero3".
        mode: of `MODES`.
        resume: checkpoint to go on from, or None.
        guard: changes of the guard's settings.
        changes: of the trainer's settings.
    """
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    reward = _killing(_tag if kind == "conflict" else digit_reward, executioner)
    extra = {"reward_funcs": reward} if kind == "grpo" else {}
    model = tiny_model(attention_dropout=0.1, initializer_range=0.05 if kind == "conflict" else 0.2)
    make = _grpo if kind == "grpo" else tiny_lm_trainer
    trainer = make(folder, model=model, **(settings(engine) | extra | changes))
    executioner.watch(trainer)
    trainer.add_callback(executioner)
    callback = None
    if MODES[mode] is not None:
        callback = _guard(kind, trainer, reward, GUARD | MODES[mode] | (guard or {}))
        trainer.add_callback(callback)
    trainer.add_callback(Last(executioner))
    floors = _Floors()
    with PassKObjective(trainer, k=GUARD["k"]) if kind == "grpo" else nullcontext() as objective:
        if objective is not None:
            floors.watch(objective)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return {
        "weights": weights(trainer),
        "rng": torch.get_rng_state(),
        "memory": None if callback is None else memory_of(callback),
        "floors": floors.seen,
        "turned": sum(bool(row.get("passk_guard/mitigated")) for row in trainer.state.log_history),
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
    probes = [
        (p.gram.tolist(), p.num_samples.tolist(), p.num_correct.tolist(), list(p.prompt_keys)) for p in memory.history
    ]
    return {"decision": memory.decision, "floor": memory.floor, "voids": memory.voids, "step": memory.step} | {
        "history": probes
    }


def events(folder):
    """What the guard said in a run, without how long it took."""
    return [{k: v for k, v in e.items() if k not in TIMES} for e in read_journal(folder).events]


def raw_lines(folder):
    """The journal's lines, every one of which must be JSON."""
    return [json.loads(line) for line in (Path(folder) / "passk_guard.jsonl").read_text().splitlines()]


def same_weights(left, right):
    """Bit for bit."""
    return all(torch.equal(left["weights"][name], right["weights"][name]) for name in left["weights"])


def _grpo(folder, prompts=96, **args):
    """More prompts than a run of two processes comes to: TRL's sampler begins its next epoch anew after a resume."""
    rows = Dataset.from_list(tiny_rows(prompts))
    return tiny_grpo_trainer(folder, scale_rewards="none", loss_type="dr_grpo", train_dataset=rows, **args)


def _guard(kind, trainer, reward, config):
    if kind != "conflict":
        held_out = config.get("source") != "training_batch"
        return PassKGuardCallback(trainer, probe_rows() if held_out else None, reward, GuardConfig(**config))
    config |= {"k": 8, "num_samples": 16, "probe_prompts": 90, "patience": 2, "threshold": 0.0}
    rows = [{"prompt": f"{i:02d}=", "wanted": "letter" if i % 7 else "digit"} for i in range(100)]
    sampler = FixedSampler(trainer.processing_class, lambda row: 0.1)
    return PassKGuardCallback(trainer, rows, reward, GuardConfig(**config), sampler)


def _tag(completions, wanted, **_):
    return [float(c.isdigit() == (w == "digit")) for c, w in zip(completions, wanted, strict=True)]


def _killing(score, executioner):
    def reward(completions, **columns):
        executioner.here("in the verifier")
        return score(completions, **columns)

    return reward


class _Floors:
    """The floor at each batch of advantages."""

    def __init__(self):
        self.seen = []

    def watch(self, objective):
        advantages = objective.advantages

        def watched(*args, **kwargs):
            self.seen.append(objective.floor)
            return advantages(*args, **kwargs)

        objective.advantages = watched
