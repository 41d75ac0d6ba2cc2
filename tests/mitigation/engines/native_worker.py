"""One rank of the tests of the native and the FSDP2 engine, started with SCENARIO FOLDER."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from passk_guard.mitigation.engines.native import ShardedEngine
from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.probe.rescoring import Rescorer
from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.ranks import Ranks
from tests.distributed.launch import leave
from tests.helpers.tiny import tiny_grpo_trainer
from tests.mitigation.engines import oracle
from tests.mitigation.engines.guarded import Projecting, train_guarded

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
NON_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
UNUSED = {"ddp_find_unused_parameters": True}
STATIC = {"ddp_static_graph": True}  # torch itself fails on it with no_sync, hence one micro-batch a step
DOUBLE = {"dtype": "float64"}
CASES = {  # in float64 any deviation is a mistake; float32 is what a run uses
    "float32_adamw": ({}, {}),
    "float32_sgd": ({"optimizer": "sgd"}, {}),
    "float32_lora": ({"model": "lora"}, {}),
    "adamw": (DOUBLE, {}),
    "sgd": (DOUBLE | {"optimizer": "sgd"}, {}),
    "one_chunk": (DOUBLE | {"chunks": 1}, {}),
    "tied": (DOUBLE | {"model": "tied"}, {}),
    "lora": (DOUBLE | {"model": "lora"}, {}),
    "unused": (DOUBLE | {"model": "unused"}, UNUSED),
    "non_reentrant": (DOUBLE | {"model": "tied"}, NON_REENTRANT),
    "reentrant": (DOUBLE | {"model": "tied"}, REENTRANT),
    "reentrant_lora": (DOUBLE | {"model": "lora"}, REENTRANT),
    "static": (DOUBLE | {"accumulation": 1}, STATIC),
    "bucket_view": (DOUBLE, {}),
}
if "ddp_static_graph" not in TrainingArguments.__dataclass_fields__:  # transformers 5.0 leaves neither to its user
    del CASES["static"], CASES["bucket_view"]
PROBED = tuple(case for case in ("float32_adamw", "unused", "static", "bucket_view", "reentrant") if case in CASES)
SHARDED = tuple(case for case in CASES if case not in ("static", "bucket_view"))


def recipe_of(case, ranks, **overrides):
    return oracle.Recipe(ranks=ranks, **(CASES[case][0] | overrides))


def whole(parameter):
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def weights_of(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: whole(p).detach().double().tolist() for name, p in model.named_parameters()}


def run(case, folder, gamma=0.2, edit=True, prepare=None):
    recipe, settings = recipe_of(case, RANKS, gamma=gamma), {"ddp_find_unused_parameters": False} | CASES[case][1]
    model = oracle.build_model(recipe)
    if prepare is not None:
        model = prepare(model)
    trainer, guard = train_guarded(
        recipe, RANK, folder, model=model, edit=edit, bucket_view=case == "bucket_view", **settings
    )
    return {"weights": weights_of(trainer), "history": guard and guard.history, "engine": guard and guard.engine.name}


def ddp(folder):
    return {case: run(case, folder) for case in CASES}


def probing(folder, cases, prepare=None):
    """Each case without an engine, and with one that probes and measures but edits nothing."""
    options = [{"gamma": None}, {"edit": False}]
    return {case: [run(case, folder, prepare=prepare, **option) for option in options] for case in cases}


class Failing(Projecting):
    """Edits nothing; a probe that raises is noted, and training goes on."""

    def on_train_begin(self, *args, **kwargs):
        super().on_train_begin(*args, **kwargs)
        self.errors = []

    def on_step_begin(self, *args, **kwargs):
        try:
            super().on_step_begin(*args, **kwargs)
        except (ValueError, FailedRefresh) as error:
            self.errors.append(f"{type(error).__name__}: {error}")

    def before_step(self):
        pass


def broken(*_):
    raise ValueError("this batch is broken")


def on_its_gradient(_module, _args, output):
    output.register_hook(broken)


HOOKS = {"forward": broken, "backward": on_its_gradient}


def failing_loss(where, ranks):
    """A probe loss that raises in the second chunk on these ranks: in the "forward", the "backward", or between."""

    def loss(model, batch):
        if RANK not in ranks or not torch.equal(batch["input_ids"], oracle.tokens(1, 1, RANK)):
            return oracle.probe_loss(model, batch)
        layer = model.get_decoder().layers[1].mlp
        hook = layer.register_forward_hook(HOOKS[where]) if where in HOOKS else None
        try:
            value = oracle.probe_loss(model, batch)
        finally:
            if hook is not None:
                hook.remove()
        return broken() if where == "between" else value

    return loss


def loss_fails(folder, ranks, prepare):
    """Weights without an engine, and with one whose probes all fail."""
    results = {}
    for where in (None, "between", "forward", "backward"):
        recipe = recipe_of("float32_adamw", RANKS, gamma=None if where is None else 0.2)
        trainer, guard = train_guarded(
            recipe,
            RANK,
            folder,
            model=prepare(oracle.build_model(recipe)),
            loss=failing_loss(where, ranks),
            projecting=Failing,
        )
        results[str(where)] = {"weights": weights_of(trainer), "errors": guard and guard.errors}
    return results


def grpo(folder, coefficient):
    """TRL's trainer on several ranks; None trains without an engine."""
    trainer = tiny_grpo_trainer(folder, max_steps=2, gradient_accumulation_steps=2)
    if coefficient is not None:
        batches = oracle.probe_batches(oracle.Recipe(), RANK)
        trainer.add_callback(Projecting(trainer, batches, coefficient=coefficient))
    trainer.train()
    return weights_of(trainer)


def grpo_runs(folder):
    return {str(coefficient): grpo(folder, coefficient) for coefficient in (None, 0.0, 0.5)}


def shard(model):
    for layer in model.get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)
    model._is_accelerate_prepared = True  # accelerate takes it as it is: on CPU it never selects FSDP by itself
    return model


def fsdp(folder):
    return {case: run(case, folder, prepare=shard) for case in SHARDED}


def rescored(model, rank, ranks):
    """[5, 3] log-ratios of completions of five prompts, after every weight has moved; each rank has its prompts."""
    mine = [x for x in range(5) for _ in range(3) if x % ranks == rank]
    tokens = [oracle.tokens(2, x, place % 3).tolist() for place, x in enumerate(mine)]
    rollouts = Rollouts([{}] * len(mine), mine, [t[0] for t in tokens], [t[1] for t in tokens], [""] * len(mine), 5)
    rescorer = Rescorer(model, Ranks(torch.device("cpu")), 30, 0)
    window = rescorer.open(rollouts, Outcomes(torch.ones(len(mine), dtype=torch.int8)), range(5), 0)
    if isinstance(model, FSDPModule):
        model.reshard()  # as the backward of a training step would
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    return rescorer.log_ratios(window)


def fsdp_by_hand(folder):
    """Without a Trainer: the probe gradient, gradients that were there before it, products, an edit, a rescoring."""
    recipe = recipe_of("unused", RANKS)
    model = shard(oracle.build_model(recipe))
    accelerator = SimpleNamespace(device=torch.device("cpu"), scaler=None, has_lomo_optimizer=False)
    engine = ShardedEngine(SimpleNamespace(accelerator=accelerator), model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kept = [torch.full_like(p, 2.0) for _, p in named]
    kept[3] = None
    for (_, parameter), grad in zip(named, kept, strict=True):
        parameter.grad = grad
    probe = engine.probe_gradient(oracle.probe_batches(recipe, RANK), oracle.probe_loss, torch.float64)
    untouched = all(p.grad is grad for (_, p), grad in zip(named, kept, strict=True))
    products = engine.inner_products([(probe, probe), (probe, engine.gradient())])
    engine.add_(probe, 0.5)
    edited = {name: whole(p.grad).tolist() for name, p in named if p.grad is not None}
    return {
        "untouched": untouched,
        "products": products,
        "missing": [name for name, p in named if p.grad is None],
        "edited": edited,
        "rescored": rescored(model, RANK, RANKS).tolist(),
    }


SCENARIOS = {
    "ddp": ddp,
    "ddp_probing": lambda folder: probing(folder, PROBED),
    "ddp_loss_fails": lambda folder: loss_fails(folder, (1,), lambda model: model),
    "grpo": grpo_runs,
    "fsdp": fsdp,
    "fsdp_by_hand": fsdp_by_hand,
    "fsdp_probing": lambda folder: probing(folder, SHARDED[:1], shard),
    "fsdp_loss_fails": lambda folder: loss_fails(folder, (0, 1), shard),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    result = SCENARIOS[sys.argv[1]](folder / "run")
    (folder / f"rank{RANK}.json").write_text(json.dumps(result))
    leave()
