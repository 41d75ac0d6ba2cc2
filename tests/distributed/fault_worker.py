"""One rank of many runs with a fault each: `python -m tests.distributed.fault_worker ENGINE[:NAME,NAME] FOLDER`.

One start of the processes serves all runs. Each is compared with an unguarded run of the same settings. A fault strikes
rank 1 alone unless stated otherwise. There is one for each way in which ranks could fall out of step: the full list
of faults is tested in one process, in tests/faults.
"""

import hashlib
import json
import logging
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from passk_guard import GuardConfig, PassKGuardCallback
from passk_guard.callback.mitigator import Mitigator
from passk_guard.callback.realised import RealisedChange
from passk_guard.mitigation.engines import protocol
from passk_guard.mitigation.engines.backward import BackwardEngine
from passk_guard.probe import passes as probe_passes
from passk_guard.probe import rescoring
from passk_guard.reporting.journal import JOURNAL_NAME
from passk_guard.sketch import ScoreSketcher
from tests.distributed.launch import leave
from tests.distributed.projection_worker import GUARD, arguments, gathered
from tests.distributed.worker import SameEverywhere, change_of, noted_windows
from tests.faults.harness import PROJECT, At, Broken
from tests.helpers.tiny import digit_reward, probe_rows, tiny_lm_trainer, tiny_model

RANK = int(os.environ.get("RANK", 0))
FAULTS = {}


def fault(engines=("ddp",), **config):
    """Register a preparation of a run: given the stack for patches, the trainer and the guard's arguments."""

    def register(prepare):
        FAULTS[prepare.__name__] = (prepare, engines, config)
        return prepare

    return register


def on_rank_1(function, otherwise=digit_reward):
    return function if RANK == 1 else otherwise


@fault(engines=("ddp", "zero3"))
def verifier_raises(stack, trainer, given):
    def raises(completions, **_):
        raise ValueError("rank 1 lost its sandbox")

    given["correct"] = on_rank_1(raises)


@fault()
def verifier_hangs(stack, trainer, given):
    given["correct"] = on_rank_1(lambda completions, **_: time.sleep(60))


@fault()
def generation_raises(stack, trainer, given):
    if RANK == 1:
        given["sampler"].sample = lambda *_: (_ for _ in ()).throw(ConnectionError("the server is gone"))


@fault(engines=("ddp", "zero3"))
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


@fault(engines=("zero3",), max_probe_tokens=50)
def sketch_raises(stack, trainer, given):
    sketch, calls = ScoreSketcher.sketch, []

    def broken(self, *args, **kwargs):
        calls.append(1)
        if RANK == 1 and len(calls) % 2 == 0:  # in the middle of the passes
            raise ArithmeticError("not foreseen")
        return sketch(self, *args, **kwargs)

    stack.enter_context(patch.object(ScoreSketcher, "sketch", broken))


def rescoring_raises(stack, method):
    """On rank 1 the second of the passes fails that this method of `Rescorer` makes."""
    scored, forward, passes = getattr(rescoring.Rescorer, method), probe_passes.forward_logits, []

    def counting(self, *args):
        passes[:] = [0]
        try:
            return scored(self, *args)
        finally:
            passes.clear()

    def broken(model, batch, **options):
        if passes:
            passes[0] += 1
            if RANK == 1 and passes[0] == 2:
                raise ArithmeticError("not foreseen")
        return forward(model, batch, **options)

    stack.enter_context(patch.object(rescoring.Rescorer, method, counting))
    stack.enter_context(patch.object(probe_passes, "forward_logits", broken))


@fault(engines=("ddp", "zero3"), mitigation="off", gives_up=False, max_probe_tokens=50)
def closing_a_window_raises(stack, trainer, given):
    rescoring_raises(stack, "log_ratios")


@fault(engines=("ddp", "zero3"), mitigation="off", gives_up=False, max_probe_tokens=50)
def opening_a_window_raises(stack, trainer, given):
    rescoring_raises(stack, "open")


@fault(mitigation="off", gives_up=False)
def a_layer_raises_as_a_window_closes(stack, trainer, given):
    scored = rescoring.Rescorer.log_ratios

    def broken(self, window):
        layer = next(module for name, module in self.model.named_modules() if name.endswith("layers.1"))
        handle = layer.register_forward_hook(no_number)
        try:
            return scored(self, window)
        finally:
            handle.remove()

    def no_number(*_):
        raise ArithmeticError("not foreseen")

    if RANK == 1:
        stack.enter_context(patch.object(rescoring.Rescorer, "log_ratios", broken))


@fault()
def estimate_raises(stack, trainer, given):
    def broken(*args, **kwargs):
        raise ArithmeticError("not foreseen")

    if RANK == 1:
        stack.enter_context(patch("passk_guard.callback.guard.estimate_pooled", broken))


@fault()
def moving_the_multiplier_raises(stack, trainer, given):
    """Between two stages that the ranks do together."""
    if RANK == 1:
        stack.enter_context(patch.object(Mitigator, "follow", lambda *_: 1 / 0))


@fault()
def the_end_of_a_refresh_raises(stack, trainer, given):
    """After the last stage that the ranks do together: there is a window on rank 0 alone."""
    opened = RealisedChange.open

    def broken(self, *args):
        opened(self, *args)
        self.drop()
        raise ArithmeticError("not foreseen")

    if RANK == 1:
        stack.enter_context(patch.object(RealisedChange, "open", broken))


def gradient_is_infinite(stack, trainer, given=None):
    """Make the loss on rank 1 infinite, and with it the average on both. The probe uses another loss."""
    compute = trainer.compute_loss
    if RANK == 1:
        trainer.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * float("inf")


@fault(reference=gradient_is_infinite, gives_up=False, refresh_steps=10)
def gradient_is_infinite_in_training(stack, trainer, given):
    gradient_is_infinite(stack, trainer)


@fault(gives_up=False)
def inner_products_fail(stack, trainer, given):
    """Fail on rank 0 and outside the refresh: rank 0's numbers count where all ranks hold the same gradient."""
    dots, refresh, probing = protocol._dots, PassKGuardCallback._refresh, []

    def dots_of_a_step(*pairs):
        return dots(*pairs) if probing else no_room()

    def refresh_with_room(self, *args):
        probing.append(True)
        try:
            return refresh(self, *args)
        finally:
            probing.pop()

    if RANK == 0:
        stack.enter_context(patch.object(protocol, "_dots", dots_of_a_step))
        stack.enter_context(patch.object(PassKGuardCallback, "_refresh", refresh_with_room))


@fault(gives_up=False)
def reaching_the_gradient_fails(stack, trainer, given):
    def broken(self):
        raise AttributeError("this version keeps its gradient elsewhere")

    if RANK == 1:
        stack.enter_context(patch.object(BackwardEngine, "gradient", broken))


def no_room(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory on rank 1")


@fault(engines=("ddp", "zero3"), mitigation="off", gives_up=False, max_probe_tokens=300)
def memory_for_half_a_batch(stack, trainer, given):
    sketch, given["passes"] = ScoreSketcher.sketch, []

    def limited(self, input_ids, *args, **kwargs):
        if RANK == 1 and input_ids.numel() > 100:
            no_room()
        given["passes"].append(input_ids.numel())
        return sketch(self, input_ids, *args, **kwargs)

    stack.enter_context(patch.object(ScoreSketcher, "sketch", limited))


@fault(failed_refresh_alert=1)
def no_report_gets_out(stack, trainer, given):
    """Rank 0, which alone reports, meets a full disk and a tracker that is down."""
    opened = Path.open

    def full(path, mode="r", **options):
        return opened(Path("/dev/full") if path.name == JOURNAL_NAME and mode == "a" else path, mode, **options)

    trainer.args.report_to = ["trackio"]
    if RANK == 0:
        stack.enter_context(patch.object(Path, "open", full))
        # transformers looks for the module before training begins, so it comes after that.
        stack.enter_context(patch.dict(sys.modules))
        trainer.add_callback(At("on_step_begin", 0, lambda: sys.modules.update(trackio=Broken("trackio"))))
    verifier_raises(stack, trainer, given)


@fault(mitigation="off", gives_up=False, arguments={"save_strategy": "steps", "save_steps": 2})
def checkpoint_on_a_full_disk(stack, trainer, given):
    save = torch.save

    def full(content, path, *args, **kwargs):
        if "passk_guard" in str(path):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        return save(content, path, *args, **kwargs)

    stack.enter_context(patch.object(torch, "save", full))


@fault(mitigation="off", gives_up=False, probe_prompts=64)
def probe_smaller_than_a_refresh(stack, trainer, given):
    given["probe"] = probe_rows(3)


@fault(engines=("ddp", "zero3"), mitigation="off", gives_up=False)
def rank_without_data(stack, trainer, given):
    """Nothing on rank 1 is solved, so that it has no sample to sketch."""
    given["correct"] = on_rank_1(lambda completions, **_: [0.0] * len(completions))


def digest(trainer):
    """A hash of all bits of the parameters."""
    parameters = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    with gathered(parameters):
        return hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in parameters)).hexdigest()


def finish(trainer):
    trainer.train()
    losses = [repr((row["loss"], row["grad_norm"])) for row in trainer.state.log_history if "loss" in row]
    return {"weights": digest(trainer), "losses": losses, "steps": trainer.state.global_step}


def new_trainer(engine, folder, more):
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    model = tiny_model(initializer_range=0.1, attention_dropout=0.1)
    return tiny_lm_trainer(folder, model=model, **(arguments(engine) | {"ddp_timeout": 60} | more))


def guarded(engine, folder, prepare, config, more):
    trainer = new_trainer(engine, folder, more)
    given = {"correct": digit_reward, "probe": probe_rows(), "sampler": SameEverywhere(trainer.processing_class)}
    logged, handler, log = [], logging.Handler(), logging.getLogger("passk_guard")
    handler.emit = lambda record: logged.append(record.getMessage())
    with ExitStack() as stack:
        log.addHandler(handler)
        stack.callback(log.removeHandler, handler)
        prepare(stack, trainer, given)
        config = GuardConfig(**(GUARD | PROJECT | {"verifier_timeout": 1.0} | config))
        guard = PassKGuardCallback(trainer, given["probe"], given["correct"], config, given["sampler"])
        trainer.add_callback(guard)
        windows = noted_windows(guard)
        began = time.monotonic()
        result = finish(trainer)
    journal = Path(trainer.args.output_dir) / JOURNAL_NAME
    events = [json.loads(line) for line in journal.read_text().splitlines()] if journal.is_file() else []
    return result | {
        "seconds": time.monotonic() - began,
        "failures": guard.memory.failures,
        "refreshes": len(guard.memory.history),
        "reasons": [e["reason"] for e in events if e["event"] == "failed_refresh"],
        "logged": logged,
        "windows": windows,
        "change": change_of(guard),
        "passes": given.get("passes", []),
        "mitigated": [r["passk_guard/mitigated"] for r in trainer.state.log_history if "passk_guard/mitigated" in r],
        "gram": guard.memory.history[0].gram.tolist() if guard.memory.history else None,
    }


def run_all(engine, only, folder):
    references, results = {}, {}
    for name, (prepare, engines, config) in FAULTS.items():
        if engine not in engines or (only and name not in only):
            continue
        config = dict(config)
        reference, more, gives_up = (
            config.pop(key, default) for key, default in (("reference", None), ("arguments", {}), ("gives_up", True))
        )
        key = repr((reference, more))
        if key not in references:
            trainer = new_trainer(engine, folder / f"reference{len(references)}", more)
            with ExitStack() as stack:
                if reference is not None:
                    reference(stack, trainer)
                references[key] = finish(trainer)
        found = guarded(engine, folder / name, prepare, config, more)
        same = {what: found.pop(what) == references[key][what] for what in ("weights", "losses", "steps")}
        results[name] = found | {"same": same, "gives_up": gives_up}
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[2])
    chosen, _, names = sys.argv[1].partition(":")
    outcome = run_all(chosen, [name for name in names.split(",") if name], target)
    (target / f"rank{RANK}.json").write_text(json.dumps(outcome))
    leave()
