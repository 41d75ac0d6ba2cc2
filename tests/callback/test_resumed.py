"""A run goes on with the memory of the folder that it was resumed from, whatever else lies in its output folder."""

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback, TrainerState

from passk_guard.callback.resumed import recall, resumed_folder
from passk_guard.callback.state import FILE_NAME, load_memory
from passk_guard.reporting.journal import read_journal, run_of
from passk_guard.utils.ranks import Ranks
from tests.callback.test_guard import guard_of
from tests.helpers.tiny import tiny_lm_trainer

STEP = 2
SAVED = {"save_strategy": "steps", "save_steps": STEP, "logging_steps": 1}


class Begun(TrainerCallback):
    """Stops a run as soon as it has begun, and keeps the guard's memory of that moment."""

    def __init__(self, guard):
        self.guard = guard

    def on_train_begin(self, args, state, control, **_):
        self.memory = self.guard.memory
        raise InterruptedError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The output folders of two runs with a checkpoint each."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        trainer = tiny_lm_trainer(folder / name, max_steps=STEP, seed=seed, **SAVED)
        guard_of(trainer, refresh_steps=1, probe_seed=seed)
        trainer.train()
    return folder


@pytest.fixture
def resumed(runs, tmp_path, caplog):
    """Resumes in a copy of an output folder; returns the memory, what was said, and the output folder."""
    caplog.set_level(logging.WARNING, logger="passk_guard")
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)

    def resume(output, *, hide=False, **argument):
        trainer = tiny_lm_trainer(tmp_path / output, max_steps=STEP + 1, **SAVED)
        if hide:
            plain = type(trainer)
            trainer.__class__ = type("Own", (plain,), {"train": lambda self: plain.train(self, **argument)})
        begun = Begun(guard_of(trainer, refresh_steps=1, verbosity="quiet"))
        trainer.add_callback(begun)
        caplog.clear()
        with pytest.raises(InterruptedError):
            trainer.train(**({} if hide else argument))
        begun.guard.detach()
        return begun.memory, caplog.text, tmp_path / output

    return resume


@pytest.mark.parametrize("hide", [False, True])
def test_the_memory_is_that_of_the_folder_resumed_from(resumed, runs, hide):
    a, b = (load_memory(runs / name / f"checkpoint-{STEP}") for name in "ab")
    assert a.run != b.run
    assert a.evidence != b.evidence
    assert len(a.evidence.checks) == STEP
    memory, said, output = resumed("b", resume_from_checkpoint=str(runs / "a" / f"checkpoint-{STEP}"), hide=hide)
    assert (memory.run, memory.evidence) == (a.run, a.evidence)
    assert (
        f"whose memory the guard follows; the memory in {output / f'checkpoint-{STEP}'} is not taken, as it may be of "
        f"another run; the events in {output / 'passk_guard.jsonl'} are left out of its report, as they are of another "
        "run\n"
    ) in said
    assert run_of(output / "passk_guard.jsonl") == a.run
    assert read_journal(output).events == []
    memory, said, output = resumed("c", resume_from_checkpoint=str(runs / "a" / f"checkpoint-{STEP}"), hide=hide)
    assert (memory.run, memory.evidence, said) == (a.run, a.evidence, "")


def test_the_newest_checkpoint_of_the_output_folder(resumed, runs):
    memory, said, output = resumed("b", resume_from_checkpoint=True)
    b = load_memory(runs / "b" / f"checkpoint-{STEP}")
    assert (memory.run, memory.evidence, said) == (b.run, b.evidence, "")
    assert [event["step"] for event in read_journal(output).of("refresh")] == [0, 1]


def test_a_checkpoint_without_an_identity_is_of_the_run_of_the_journal(resumed, runs, tmp_path):
    path = tmp_path / "b" / f"checkpoint-{STEP}" / FILE_NAME
    content = torch.load(path, weights_only=True)
    del content["run"]
    torch.save(content, path)
    memory, said, output = resumed("b", resume_from_checkpoint=str(path.parent))
    b = load_memory(runs / "b" / f"checkpoint-{STEP}")
    assert (memory.run, memory.evidence, said) == (b.run, b.evidence, "")
    assert [event["step"] for event in read_journal(output).of("refresh")] == [0, 1]


def test_a_folder_that_was_not_named_must_hold_the_same_log(runs):
    """Whoever calls the training loop without `resume_from_checkpoint` in sight."""
    a = runs / "a" / f"checkpoint-{STEP}"
    state = TrainerState.load_from_json(a / "trainer_state.json")
    trainer, args = object(), SimpleNamespace(output_dir=str(runs / "a"), resume_from_checkpoint=None)
    assert resumed_folder(trainer, args, state) == a
    args.output_dir = str(runs / "b")
    assert resumed_folder(trainer, args, state) is None, "an older checkpoint of the same step"
    args.resume_from_checkpoint = str(a)
    assert resumed_folder(trainer, args, state) == a
    state.global_step += 1
    assert resumed_folder(trainer, args, state) is None, "a guard that is added later"


class Second(Ranks):
    """The second of two ranks, whose first has a run of its own on its disk."""

    def from_first(self, tensor):
        return torch.tensor([int("1aaaaaaaaaaaa", 16)])


def test_ranks_with_memories_of_two_runs_start_afresh(runs):
    a, said = runs / "a" / f"checkpoint-{STEP}", []
    state = TrainerState.load_from_json(a / "trainer_state.json")
    args = SimpleNamespace(output_dir=str(runs / "a"), resume_from_checkpoint=None)
    memory, _ = recall(object(), args, state, Second(torch.device("cpu")), said.append)
    assert said == ["resumed without the guard's memory, starting afresh"]
    assert (memory.run, memory.evidence.checks) == ("a" * 12, ())
    memory, _ = recall(object(), args, state, Ranks(torch.device("cpu")), said.append)
    assert len(memory.evidence.checks) == STEP
