"""One rank of many runs with a fault each: `python -m tests.distributed.fault_worker ENGINE[:NAME,NAME] FOLDER`.

All in one start of the processes, each beside an unguarded run of the same settings. Most faults strike rank 1 alone.
"""

import hashlib
import json
import logging
import os
import signal
import sys
import time
import types
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from passk_guard import GuardConfig, PassKGuardCallback
from passk_guard.mitigation.engines.backward import BackwardEngine
from passk_guard.mitigation.protected_direction import Pass1Loss
from passk_guard.sketch import ScoreSketcher
from tests.distributed.launch import leave
from tests.distributed.projection_worker import GUARD, arguments
from tests.distributed.worker import SameEverywhere
from tests.faults.harness import PROJECT, At
from tests.faults.test_report_faults import Broken
from tests.helpers.tiny import digit_reward, probe_rows, tiny_lm_trainer, tiny_model

RANK = int(os.environ.get("RANK", 0))
FAULTS = {}


def fault(engines=("ddp", "zero3"), **config):
    """Register a preparation of a run: given the stack for patches, the trainer and the guard's arguments."""

    def register(prepare):
        FAULTS[prepare.__name__] = (prepare, engines, config)
        return prepare

    return register


def on_rank_1(function, otherwise=digit_reward):
    return function if RANK == 1 else otherwise


# Verifiers


@fault()
def verifier_raises(stack, trainer, given):
    def raises(completions, **_):
        raise ValueError("rank 1 lost its sandbox")

    given["correct"] = on_rank_1(raises)


@fault()
def verifier_hangs(stack, trainer, given):
    given["correct"] = on_rank_1(lambda completions, **_: time.sleep(60))


@fault(engines=("ddp",))
def verifier_hangs_everywhere(stack, trainer, given):
    given["correct"] = lambda completions, **_: time.sleep(60)


@fault(engines=("ddp",))
def verifier_exits(stack, trainer, given):
    def exits(completions, **_):
        sys.exit(3)

    given["correct"] = on_rank_1(exits)


@fault(engines=("ddp",))
def verifier_returns_texts(stack, trainer, given):
    given["correct"] = on_rank_1(lambda completions, **_: ["yes"] * len(completions))


@fault(engines=("ddp",))
def verifier_returns_nan(stack, trainer, given):
    given["correct"] = lambda completions, **_: [float("nan")] * len(completions)


# Samplers


def changing(given, **fields):
    sample = given["sampler"].sample

    def changed(*args):
        samples = sample(*args)
        return types.SimpleNamespace(**(vars(samples) | {k: f(samples) for k, f in fields.items()}))

    if RANK == 1:
        given["sampler"].sample = changed


@fault(engines=("ddp",))
def generation_returns_nothing(stack, trainer, given):
    changing(given, completion_ids=lambda s: [[] for _ in s.completion_ids])


@fault(engines=("ddp",))
def generation_returns_overlong_text(stack, trainer, given):
    changing(given, completion_ids=lambda s: [[7] * 100 for _ in s.completion_ids])


@fault(engines=("ddp",))
def generation_raises(stack, trainer, given):
    changing(given, completion_ids=lambda s: s.nowhere)


# Numbers that are not finite


@fault(engines=("ddp",))
def logits_are_nan(stack, trainer, given):
    sketch = ScoreSketcher.sketch

    def broken(self, *args, **kwargs):
        last_norm = [module for module in self.model.modules() if "Norm" in type(module).__name__][-1]
        handle = last_norm.register_forward_hook(lambda module, given, out: out * float("nan"))
        try:
            return sketch(self, *args, **kwargs)
        finally:
            handle.remove()

    if RANK == 1:
        stack.enter_context(patch.object(ScoreSketcher, "sketch", broken))


def gradient_is_infinite(stack, trainer, given=None):
    """Of the loss on rank 1; what the ranks average is infinite on both. Not in the probe, which scores by slots."""
    compute = trainer.compute_loss
    if RANK == 1:
        trainer.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * float("inf")


@fault(engines=("ddp",), reference=gradient_is_infinite, gives_up=False, refresh_steps=10)
def gradient_is_infinite_in_training(stack, trainer, given):
    gradient_is_infinite(stack, trainer)


@fault(engines=("ddp",), gives_up=False)
def inner_products_fail(stack, trainer, given):
    import passk_guard.mitigation.engines.inner_products as inner

    def no_room(*_):
        raise torch.OutOfMemoryError("no room for an inner product")

    if RANK == 0:  # whose numbers count where gradients are the same on all ranks
        dots = inner._dots

        def in_a_step(*given):
            return dots(*given) if getattr(trainer, "in_probe", False) else no_room()

        stack.enter_context(patch.object(inner, "_dots", in_a_step))
        refresh = PassKGuardCallback._refresh

        def probing(self, *args):
            trainer.in_probe = True
            try:
                return refresh(self, *args)
            finally:
                trainer.in_probe = False

        stack.enter_context(patch.object(PassKGuardCallback, "_refresh", probing))


@fault(engines=("ddp",), gives_up=False)
def reaching_the_gradient_fails(stack, trainer, given):
    def broken(self):
        raise AttributeError("this version keeps its gradient elsewhere")

    if RANK == 1:
        stack.enter_context(patch.object(BackwardEngine, "gradient", broken))


# Memory


def no_room(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory on rank 1")


def limited_sketch(stack, room, given):
    sketch, given["passes"] = ScoreSketcher.sketch, []

    def limited(self, input_ids, *args, **kwargs):
        if RANK == 1 and input_ids.numel() > room:
            no_room()
        given["passes"].append(input_ids.numel())
        return sketch(self, input_ids, *args, **kwargs)

    stack.enter_context(patch.object(ScoreSketcher, "sketch", limited))


@fault(mitigation="off", gives_up=False, max_probe_tokens=300)
def memory_for_half_a_batch(stack, trainer, given):
    limited_sketch(stack, 100, given)


@fault(max_probe_tokens=50)
def memory_for_nothing(stack, trainer, given):
    limited_sketch(stack, 2, given)  # a filler's two tokens


@fault(max_probe_tokens=50)
def memory_for_no_harvest(stack, trainer, given):
    original = Pass1Loss.__call__

    def limited(self, model, batch):
        if RANK == 1 and bool((batch.slots >= 0).any()):
            no_room()
        return original(self, model, batch)

    stack.enter_context(patch.object(Pass1Loss, "__call__", limited))


@fault(mitigation="off", gives_up=False)
def memory_for_few_samples(stack, trainer, given):
    sampler = given["sampler"]
    sampler.size, sample = 64, sampler.sample

    def limited(*args):
        given.setdefault("sizes", []).append(sampler.size)
        if RANK == 1 and sampler.size > 20:
            no_room()
        return sample(*args)

    def fewer():
        sampler.size //= 2
        return sampler.size > 0

    sampler.sample, sampler.sample_fewer = limited, fewer


# What nobody foresaw, on one rank


@fault(max_probe_tokens=50)
def sketch_raises(stack, trainer, given):
    sketch, calls = ScoreSketcher.sketch, []

    def broken(self, *args, **kwargs):
        calls.append(1)
        if RANK == 1 and len(calls) % 2 == 0:  # in the middle of the passes
            raise ArithmeticError("not foreseen")
        return sketch(self, *args, **kwargs)

    stack.enter_context(patch.object(ScoreSketcher, "sketch", broken))


@fault(engines=("ddp",))
def gram_raises(stack, trainer, given):
    if RANK == 1:
        stack.enter_context(patch("passk_guard.probe.refresh.gram_matrix", no_room))


@fault(engines=("ddp",))
def estimate_raises(stack, trainer, given):
    def broken(*args, **kwargs):
        raise ArithmeticError("not foreseen")

    if RANK == 1:
        stack.enter_context(patch("passk_guard.callback.guard.estimate_pooled", broken))


# Reports and disks


@fault(engines=("ddp",), mitigation="off", gives_up=False)
def journal_on_a_full_disk(stack, trainer, given):
    opened, name = Path.open, "passk_guard.jsonl"

    def full(path, mode="r", **options):
        return opened(Path("/dev/full") if path.name == name and mode == "a" else path, mode, **options)

    if RANK == 0:
        stack.enter_context(patch.object(Path, "open", full))


@fault(engines=("ddp",), mitigation="off", gives_up=False, arguments={"save_strategy": "steps", "save_steps": 2})
def checkpoint_on_a_full_disk(stack, trainer, given):
    save = torch.save

    def full(content, path, *args, **kwargs):
        if "passk_guard" in str(path):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        return save(content, path, *args, **kwargs)

    stack.enter_context(patch.object(torch, "save", full))


def broken_tracker(stack, trainer):
    """On rank 0, which alone speaks to it; there once training has begun, since transformers looks for it before."""
    trainer.args.report_to = ["trackio"]
    if RANK == 0:
        stack.enter_context(patch.dict(sys.modules))
        trainer.add_callback(At("on_step_begin", 0, lambda: sys.modules.update(trackio=Broken("trackio"))))


@fault(engines=("ddp",), mitigation="off", gives_up=False, image_refreshes=1)
def tracker_takes_no_pictures(stack, trainer, given):
    broken_tracker(stack, trainer)


@fault(engines=("ddp",), failed_refresh_alert=1)
def tracker_takes_no_alerts(stack, trainer, given):
    broken_tracker(stack, trainer)
    verifier_raises(stack, trainer, given)


class Raising(logging.Handler):
    def emit(self, record):
        raise ConnectionError("the log server is down")


@fault(engines=("ddp",))
def log_handler_raises(stack, trainer, given):
    handler, log = Raising(), logging.getLogger("passk_guard")
    log.addHandler(handler)
    stack.callback(log.removeHandler, handler)
    verifier_raises(stack, trainer, given)


# The life of a trainer


@fault(engines=("ddp",), mitigation="off", gives_up=False)
def callback_added_twice(stack, trainer, given):
    given["times"] = 2


@fault(engines=("ddp",), mitigation="off", gives_up=False, trains=2)
def train_called_twice(stack, trainer, given):
    pass


def crashing(stack, trainer, given=None):
    """On all ranks, as an exception of the user's that depends on the step does."""

    def crash():
        raise KeyError("mine")

    trainer.add_callback(At("on_step_end", 2, crash))


@fault(engines=("ddp",), mitigation="off", gives_up=False, reference=crashing, trains=2)
def exception_of_the_users(stack, trainer, given):
    given["after"] = lambda: crashing(stack, trainer)


EVALUATING = {"save_strategy": "steps", "save_steps": 2, "per_device_eval_batch_size": 4}


@fault(engines=("ddp",), mitigation="off", gives_up=False, arguments=EVALUATING)
def evaluation_and_checkpoint_on_the_step_of_a_refresh(stack, trainer, given):
    pass


@fault(engines=("ddp",), mitigation="off", gives_up=False, probe_prompts=64)
def probe_smaller_than_a_refresh(stack, trainer, given):
    given["probe"] = probe_rows(3)


@fault(mitigation="off", gives_up=False)
def rank_without_data(stack, trainer, given):
    """Nothing on rank 1 is solved, so that it has no sample to sketch."""
    given["correct"] = on_rank_1(lambda completions, **_: [0.0] * len(completions))


def terminating(stack, trainer, given=None):
    def terminate():
        for callback in trainer.callback_handler.callbacks:
            if getattr(callback, "jit_manager", None) is not None:
                callback.jit_manager.kill_wait = 0
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    trainer.add_callback(At("on_step_begin", 2, terminate))


@fault(engines=("ddp",), reference=terminating, arguments={"enable_jit_checkpoint": True})
def sigterm_between_probe_and_step(stack, trainer, given):
    verifier_raises(stack, trainer, given)
    given["after"] = lambda: terminating(stack, trainer)


def digest(trainer):
    """A hash of all bits of the parameters."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = list(model.parameters())
    gathered = ExitStack()
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(parameters)
    with gathered:
        return hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in parameters)).hexdigest()


def finish(trainer, trains):
    errors, losses = [], []
    for _ in range(trains):
        try:
            trainer.train()
        except KeyError as error:
            errors.append(str(error))
        losses += [repr((row["loss"], row["grad_norm"])) for row in trainer.state.log_history if "loss" in row]
    return {"weights": digest(trainer), "losses": losses, "errors": errors, "steps": trainer.state.global_step}


def new_trainer(engine, folder, more):
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    model = tiny_model(initializer_range=0.1, attention_dropout=0.1)
    trainer = tiny_lm_trainer(folder, model=model, **(arguments(engine) | {"ddp_timeout": 60} | more))
    if more is EVALUATING:
        from transformers.trainer_utils import IntervalStrategy

        trainer.eval_dataset = list(trainer.train_dataset)[:8]
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 2
    return trainer


@contextmanager
def listening():
    """The lines that the guard logs."""
    lines, handler, log = [], logging.Handler(), logging.getLogger("passk_guard")
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)


def guarded(engine, name, folder, prepare, config, more, trains):
    trainer = new_trainer(engine, folder, more)
    given = {"correct": digit_reward, "probe": probe_rows(), "sampler": SameEverywhere(trainer.processing_class)}
    with ExitStack() as stack:
        told = stack.enter_context(listening())
        prepare(stack, trainer, given)
        settings = GUARD | PROJECT | {"verifier_timeout": 1.0} | config
        probe, correct, sampler = given["probe"], given["correct"], given["sampler"]
        guard = PassKGuardCallback(trainer, probe, correct, GuardConfig(**settings), sampler)
        for _ in range(given.get("times", 1)):
            trainer.add_callback(guard)
        given.get("after", lambda: None)()
        began = time.monotonic()
        result = finish(trainer, trains)
    journal = Path(trainer.args.output_dir) / "passk_guard.jsonl"
    lines = journal.read_text().splitlines() if journal.is_file() else []
    events = [json.loads(line) for line in lines]
    return result | {
        "seconds": time.monotonic() - began,
        "voids": guard.memory.voids,
        "refreshes": len(guard.memory.history),
        "reasons": [e["reason"] for e in events if e["event"] == "failed_refresh"],
        "kinds": [e["event"] for e in events if e["event"] in ("refresh", "failed_refresh")],
        "told": told,
        "passes": given.get("passes", []),
        "sizes": given.get("sizes", []),
        "mitigated": [r["passk_guard/mitigated"] for r in trainer.state.log_history if "passk_guard/mitigated" in r],
        "gram": guard.memory.history[0].gram.tolist() if guard.memory.history else None,
    }


def run_all(engine, only, folder):
    references, results = {}, {}
    for name, (prepare, engines, config) in FAULTS.items():
        if engine not in engines or (only and name not in only):
            continue
        config = dict(config)
        reference, trains = config.pop("reference", None), config.pop("trains", 1)
        more, gives_up = config.pop("arguments", {}), config.pop("gives_up", True)
        key = repr((reference, trains, more))
        if key not in references:
            trainer = new_trainer(engine, folder / f"reference{len(references)}", more)
            with ExitStack() as stack:
                if reference is not None:
                    reference(stack, trainer)
                references[key] = finish(trainer, trains)
        found = guarded(engine, name, folder / name, prepare, config, more, trains)
        same = {what: found.pop(what) == references[key][what] for what in ("weights", "losses", "errors", "steps")}
        results[name] = found | {"same": same, "gives_up": gives_up}
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[2])
    chosen, _, names = sys.argv[1].partition(":")
    outcome = run_all(chosen, [name for name in names.split(",") if name], target)
    (target / f"rank{RANK}.json").write_text(json.dumps(outcome))
    leave()
