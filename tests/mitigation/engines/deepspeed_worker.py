"""One rank of the tests of the DeepSpeed engines, started with SCENARIO FOLDER.

Each rank leaves what `SCENARIO` returns in FOLDER/rank{r}.pt.
"""

import contextlib
import faulthandler
import hashlib
import logging
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch
from accelerate.state import AcceleratorState
from deepspeed.accelerator import get_accelerator
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from passk_guard.mitigation.engines.deepspeed.choose import deepspeed_engine
from passk_guard.utils.errors import FailedRefresh, GuardError
from tests.distributed.launch import leave
from tests.helpers.tiny import tiny_grpo_trainer
from tests.mitigation.engines import oracle
from tests.mitigation.engines.deepspeed_cases import CASES, EXACT, HARD, OVERFLOWING, ROUNDED, STAGES, UNEVEN
from tests.mitigation.engines.guarded import FixedTrainer, Projecting

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def gathered(engine):
    """Every parameter by name, whole, in float64."""
    parameters = dict(engine.module.named_parameters())
    sharded = any(hasattr(p, "ds_id") for p in parameters.values())
    whole = deepspeed.zero.GatheredParameters(list(parameters.values())) if sharded else contextlib.nullcontext()
    with whole:
        return {name: p.detach().double().clone() for name, p in parameters.items()}


def digest(named):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in sorted(named.items()))).hexdigest()


def engine_of(trainer):
    return trainer.accelerator.deepspeed_engine_wrapped.engine


def built(name, folder, **changes):
    """A trainer of one case, ready to train."""
    recipe, config, settings = CASES[name]
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    recipe = oracle.Recipe(**({"ranks": RANKS} | recipe | changes))
    model = oracle.build_model(recipe)  # before the config is known: not through zero.Init
    return FixedTrainer(recipe, RANK, folder, model, deepspeed=config, **settings)


def train(name, folder, guard=None, **changes):
    """Final weights of one case under `guard(trainer, probe batches)`, and that guard."""
    trainer = built(name, folder, **changes)
    callback = None
    if guard is not None:
        callback = guard(trainer, oracle.probe_batches(trainer.recipe, RANK))
        trainer.add_callback(callback)
    trainer.train()
    return gathered(engine_of(trainer)), callback


def exact(name, folder):
    """A guarded run, one that probes and adds nothing, and one without an engine."""
    weights, guard = train(name, folder, Projecting)
    plain, _ = train(name, folder)
    unmoved, _ = train(name, folder, lambda *args: Projecting(*args, coefficient=0.0))
    return {
        "weights": weights if RANK == 0 else None,
        "plain": plain if RANK == 0 else None,
        "engine": guard.engine.name,
        "digest": digest(weights),
        "history": guard.history,
        "probe_leaves_no_trace": digest(unmoved) == digest(plain),
    }


class Replacing(Projecting):
    """The optimizer gets the probe gradient in place of the training gradient."""

    def before_step(self):
        gradient = self.engine.gradient()
        self.engine.add_(gradient, -1.0)
        self.engine.add_(self.protected, 1.0)
        self.history.append({"norm": self.engine.inner_products([(gradient, gradient)])[0]})


def replaced(name, folder):
    """One step of SGD on the probe gradient alone."""
    changes = {"optimizer": "sgd", "steps": 1, "chunks": 3, "learning_rate": 0.1, "max_norm": 1e9, "weight_decay": 0.0}
    weights, guard = train(name, folder, Replacing, **changes)
    return {"weights": weights if RANK == 0 else None, "norm": guard.history[0]["norm"], "changes": changes}


class Boom(RuntimeError):
    pass


def failing(where):
    """A probe loss that raises in the second chunk, on all ranks unless `where` is "one_rank"."""
    calls = []

    def loss(engine, batch):
        calls.append(1)
        if len(calls) == 1:
            return oracle.probe_loss(engine, batch)
        layer = next(m for n, m in engine.module.named_modules() if n.endswith("layers.0"))
        if where == "before":
            raise Boom
        if where == "forward":
            hook = layer.register_forward_hook(explode)
        elif where == "backward":
            hook = layer.register_forward_hook(lambda module, args, output: output.register_hook(explode) and None)
        else:
            hook = None
        try:
            value = oracle.probe_loss(engine, batch)
        finally:
            if hook is not None:
                hook.remove()
        if where == "after" or (where == "one_rank" and RANK == RANKS - 1):
            raise Boom
        return value[None, None].expand(2, 2) if where == "shape" else value

    return loss


def explode(*args):
    raise Boom


def state_of(engine):
    """All that DeepSpeed holds beside weights and moments, comparable."""
    plain = (bool, int, float, str, type(None))
    optimizer = engine.optimizer
    objects = [engine, optimizer, getattr(optimizer, "_backward_hook_state", None)]
    objects += [engine.tput_timer, getattr(optimizer, "loss_scaler", None), *engine.timers.timers.values()]
    state = [len(engine.timers.timers)]
    for obj in filter(None, objects):
        for key, value in sorted(vars(obj).items()):
            if isinstance(value, dict):
                value = sorted((str(k), id(v) if not isinstance(v, plain) else v) for k, v in value.items())
            elif isinstance(value, (list, set)):
                value = [v if isinstance(v, (*plain, list)) else id(v) for v in value]
            state.append((key, str(value) if isinstance(value, (*plain, list)) else id(value)))
    state += [p.grad is None for p in engine.module.parameters()]
    names = ("fp32_groups_gradients_flat", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    buffers = [getattr(optimizer, "grad_partitions_flat_buffer", None), *getattr(optimizer, names[0], [])]
    buffers += [t.grad for name in names[1:] for t in getattr(optimizer, name, [])]
    buffers += getattr(optimizer, "accumulated_grads_in_cpu", {}).values()
    state += [hashlib.sha256(b.numpy().tobytes()).hexdigest() for b in buffers if b is not None]
    state += [getattr(p, "ds_status", None) for p in engine.module.parameters()]
    return state


class Failing(Projecting):
    """Before each probe that goes well, some that fail."""

    ways = ("before", "after", "forward", "backward", "shape", "one_rank")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.raised, self.changed = [], []

    def on_step_begin(self, *args, **kwargs):
        engine = engine_of(self.trainer)
        for way in self.ways if RANKS > 1 else self.ways[:-1]:
            before = state_of(engine)
            try:
                self.engine.probe_gradient(self.batches, failing(way))
            except (Boom, GuardError, FailedRefresh) as error:
                self.raised.append((way, type(error).__name__))
            self.compare(way, before)
        before = state_of(engine)
        super().on_step_begin(*args, **kwargs)
        if self.history:  # the very first forward gathers ZeRO-3's persistent parameters for good
            self.compare("none", before)

    def compare(self, way, before):
        after = state_of(engine_of(self.trainer))
        self.changed += [(way, str(a), str(b)) for a, b in zip(before, after, strict=True) if a != b]


def failed(name, folder):
    """Failing probes before each step of a guarded run."""
    weights, _ = train(name, folder, Projecting)
    after, guard = train(name, folder, Failing)
    return {"same": digest(weights) == digest(after), "raised": guard.raised, "changed": guard.changed}


class Misused(Projecting):
    """Every call that must be refused, and what is left behind by `remove`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.refused, self.before = [], None

    def expect(self, what, call):
        try:
            call()
        except GuardError as error:
            self.refused.append((what, str(error)))

    def on_train_begin(self, *args, **kwargs):
        self.before = set(vars(engine_of(self.trainer)))
        super().on_train_begin(*args, **kwargs)
        self.expect("twice", lambda: self.engine.install(self.before_step))

    def on_step_begin(self, *args, **kwargs):
        uneven = self.batches[: 1 + RANK]
        self.expect("uneven", lambda: self.engine.probe_gradient(uneven, self.loss))
        self.expect("none", lambda: self.engine.probe_gradient([], self.loss))
        self.expect("outside", self.engine.gradient)
        self.expect("add outside", lambda: self.engine.add_([], 1.0))
        super().on_step_begin(*args, **kwargs)

    def on_substep_end(self, *args, **kwargs):
        self.expect("window", lambda: self.engine.probe_gradient(self.batches, self.loss))

    def before_step(self):
        self.expect("inside", lambda: self.engine.probe_gradient(self.batches, self.loss))
        super().before_step()

    def on_train_end(self, *args, **kwargs):
        super().on_train_end(*args, **kwargs)
        self.engine.remove()
        self.left = set(vars(engine_of(self.trainer))) - self.before


def misused(name, folder):
    weights, _ = train(name, folder, Projecting)
    after, guard = train(name, folder, Misused)
    return {"same": digest(weights) == digest(after), "refused": guard.refused, "left": guard.left}


def own_loop(name, folder):
    """DeepSpeed without accelerate: `step` is called on every micro-batch and finds the boundary by counting."""
    fields, config, _ = CASES[name]
    recipe = oracle.Recipe(**({"ranks": RANKS} | fields))
    model = oracle.build_model(recipe)
    config = config | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": recipe.accumulation,
        "gradient_clipping": recipe.max_norm,
    }
    optimizer = oracle.make_optimizer(recipe, [p for p in model.parameters() if p.requires_grad])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(deepspeed_engine_wrapped=SimpleNamespace(engine=engine)))
    guard = Projecting(trainer, oracle.probe_batches(recipe, RANK))
    guard.engine = deepspeed_engine(trainer)
    guard.engine.install(guard.before_step)
    for index, batch in enumerate(oracle.training_batches(recipe, RANK)):
        if index % recipe.accumulation == 0:
            guard.on_step_begin(None, None, None)
        engine.backward(oracle.training_loss(engine, batch))
        engine.step()
    guard.engine.remove()
    weights = gathered(engine)
    return {"weights": weights if RANK == 0 else None, "history": guard.history}


def overflow(name, folder):
    """fp16 with a loss scale that overflows at first: weights, skipped steps and scale, without and with a guard."""

    def run(guard):
        trainer = built(name, folder, steps=8)
        if guard:
            trainer.add_callback(Projecting(trainer, oracle.probe_batches(trainer.recipe, RANK), coefficient=0.0))
        trainer.train()
        engine = engine_of(trainer)
        return digest(gathered(engine)), engine.skipped_steps, engine.optimizer.loss_scale

    return {"plain": run(False), "guarded": run(True)}


class Erasing(Projecting):
    """Takes the whole gradient away."""

    def before_step(self):
        gradient = self.engine.gradient()
        self.history.append(self.engine.inner_products([(gradient, gradient)])[0])
        self.engine.add_(gradient, -1.0)


def grpo(name, folder):
    """GRPO with no engine, one that adds nothing, one that erases the gradient, and one that projects."""
    _, config, _ = CASES[name]
    recipe = oracle.Recipe(ranks=RANKS)

    def run(guard=None):
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state()
        model = oracle.build_model(recipe)
        args = {"deepspeed": config, "max_steps": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.0}
        trainer = tiny_grpo_trainer(folder, model=model, optim="adamw_torch", **args)
        callback = None
        if guard is not None:
            callback = guard(trainer, oracle.probe_batches(recipe, RANK))
            trainer.add_callback(callback)
        trainer.train()
        return digest(gathered(engine_of(trainer))), callback

    unset_hf_deepspeed_config()
    start = digest(oracle.weights(oracle.build_model(recipe)))
    plain, _ = run()
    nothing, _ = run(lambda *args: Projecting(*args, coefficient=0.0))
    erased, eraser = run(Erasing)
    pushed, _ = run(lambda *args: Projecting(*args, coefficient=0.5))
    return {
        "start": start,
        "plain": plain,
        "nothing": nothing,
        "erased": erased,
        "pushed": pushed,
        "norms": eraser.history,
    }


def each(scenario, names):
    def run(folder):
        results = {}
        for name in names:
            print(f"rank {RANK}: {scenario.__name__} {name}", file=sys.stderr, flush=True)
            try:
                results[name] = scenario(name, folder)
            except Exception:
                results[name] = {"error": traceback.format_exc()}
        return results

    return run


SCENARIOS = {
    "exact": (exact, EXACT),
    "hard": (exact, HARD),
    "rounded": (exact, ROUNDED),
    "uneven": (exact, UNEVEN),
    "replaced": (replaced, STAGES),
    "failed": (failed, STAGES),
    "misused": (misused, STAGES),
    "own_loop": (own_loop, STAGES),
    "overflow": (overflow, OVERFLOWING),
    "grpo": (grpo, ("zero2", "zero3")),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(560, exit=True)  # a hang says where
    logging.disable(logging.WARNING)
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed refuses on a CPU; torch computes it there
    folder = Path(sys.argv[2])
    results = {}
    for scenario in sys.argv[1].split(","):
        function, names = SCENARIOS[scenario]
        results[scenario] = each(function, sys.argv[3:] or names)(folder / "run")
    torch.save(results, folder / f"rank{RANK}.pt")
    leave()
