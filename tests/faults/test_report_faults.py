"""Disks that are full, trackers and log handlers that raise: a report is missing, and training goes on unchanged."""

import json
import logging
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from passk_guard import report
from passk_guard.reporting import log_rows, reporter
from passk_guard.reporting.journal import Journal
from tests.faults.harness import PROJECT, At, Broken, Texts, add_guard, assert_same, fill_the_disk, make, raises, train


def guarded(trainer, **config):
    return train(trainer, add_guard(trainer, **({"sampler": Texts(trainer.processing_class)} | config)))


def test_a_full_disk_at_the_journal(references, tmp_path, caplog, monkeypatch):
    fill_the_disk(monkeypatch)
    trainer = make("lm", tmp_path)
    run = guarded(trainer, refresh_steps=1)
    assert caplog.text.count("takes no more events") == 1
    arguments = [argument for record in caplog.records for argument in record.args or ()]
    assert not any(isinstance(one, BaseException) for one in arguments), "its frames would live as long as the record"
    assert "No space left on device" in caplog.text
    assert run.guard.estimate is not None
    assert any("passk_guard/pass_at_1" in row for row in trainer.state.log_history)
    assert_same(run, references.of("lm"))


def test_a_line_cut_short_by_a_full_disk_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "passk_guard.jsonl"
    journal = Journal(path)
    journal.write("refresh", 0, cosine=0.5)
    whole = path.read_text()
    with monkeypatch.context() as patch:
        fill_the_disk(patch)
        journal.write("refresh", 1, cosine=0.5)
    assert path.read_text() == whole


@pytest.mark.parametrize("rest", ['{"event": "refr', '{"event": "refresh", "step": 3}', "\n\n{", "é" * 10])
def test_what_a_crash_left_of_a_line_is_gone_before_the_next(rest, tmp_path):
    path = tmp_path / "passk_guard.jsonl"
    Journal(path).write("refresh", 0, verdict="clear")
    path.write_text(path.read_text() + rest)
    Journal(path).write("failed_refresh", 5, reason="r")
    events = [json.loads(line) for line in path.read_text().splitlines() if line]
    assert [e["step"] for e in events] == [0, 5]
    assert report(tmp_path).journals[0].events


def write_half(content, path):
    Path(path).write_bytes(b"PK")
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


def find_no_folder(content, path):
    shutil.rmtree(Path(path).parent)
    raise RuntimeError("Parent directory does not exist")


@pytest.mark.parametrize("failing", [write_half, find_no_folder])
def test_a_checkpoint_that_cannot_be_written(failing, tmp_path, monkeypatch, caplog, references):
    save = torch.save

    def full(content, path, *args, **kwargs):
        return (failing if "passk_guard" in str(path) else save)(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    trainer = make("lm", tmp_path, save_strategy="steps", save_steps=2)
    # The verifier finds nothing right: there is nothing to protect, so that no step is projected.
    run = guarded(trainer, correct=lambda completions, **_: [0.0] * len(completions), **PROJECT)
    assert run.error is None
    assert "the checkpoint holds no memory of the guard" in caplog.text
    assert not list(tmp_path.glob("checkpoint-*/passk_guard*")), "nothing half written is left"
    assert failing is find_no_folder or list(tmp_path.glob("checkpoint-*/model.safetensors"))
    assert_same(run, references.of("lm"))


class Explosive(types.ModuleType):
    """A module of which not even an attribute can be read."""

    def __getattribute__(self, name):
        raise ConnectionError("the tracker is down")


@pytest.mark.parametrize(("name", "tracker"), [("wandb", Broken), ("trackio", Broken), ("wandb", Explosive)])
def test_a_tracker_that_raises(name, tracker, references, tmp_path, monkeypatch, caplog):
    trainer = make("lm", tmp_path)
    calls = []

    def sometimes(completions, **_):
        calls.append(1)
        if len(calls) > 2:
            raise ValueError
        return [float(c.isdigit()) for c in completions]

    guard = add_guard(
        trainer,
        sampler=Texts(trainer.processing_class),
        correct=sometimes,
        refresh_steps=1,
        image_refreshes=1,
        failed_refresh_alert=1,
    )
    trainer.args.report_to = [name]
    # transformers looks for the module before training begins, so it comes after that.
    trainer.callback_handler.callbacks.insert(
        0, At("on_step_begin", 0, lambda: monkeypatch.setitem(sys.modules, name, tracker(name)))
    )
    run = train(trainer, guard)
    monkeypatch.undo()
    assert run.error is None
    assert f"{name} did not take the alert: ConnectionError: the tracker is down" in caplog.text
    if tracker is Broken:
        assert f"{name} did not take the pictures of the kernel: ConnectionError" in caplog.text
    assert run.failed == [False, False, True, True]
    assert_same(run, references.of("lm"))


def test_a_tensorboard_writer_that_raises(references, tmp_path, caplog):
    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    trainer = make("lm", tmp_path)
    trainer.callback_handler.callbacks[0].tb_writer = types.SimpleNamespace(add_image=broken, add_figure=broken)
    run = guarded(trainer, image_refreshes=1)
    assert "tensorboard did not take the pictures" in caplog.text
    assert run.failed == [False, False]
    assert_same(run, references.of("lm"))


class Raising(logging.Handler):
    """A handler that sends lines elsewhere and fails, past the handling of errors in logging."""

    def emit(self, record):
        raise ConnectionError("the log server is down")


def test_a_log_handler_that_raises(references, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("passk_guard"), "handlers", [Raising()])
    trainer = make("lm", tmp_path, save_strategy="steps", save_steps=2)
    run = guarded(trainer, correct=raises, **PROJECT)
    assert run.error is None
    assert run.failed == [True, True]
    assert_same(run, references.of("lm"))


PARTS = [
    (reporter, "estimate_metrics"),
    (reporter, "state_change"),
    (Journal, "write"),
    (log_rows, "log_row"),
]


@pytest.mark.parametrize(("place", "name"), PARTS, ids=[name for _, name in PARTS])
def test_any_part_of_a_report_that_raises(place, name, references, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ArithmeticError("not foreseen")

    monkeypatch.setattr(place, name, broken)
    trainer = make("lm", tmp_path)
    calls = []

    def sometimes(completions, **_):
        calls.append(1)
        return [float(c.isdigit()) for c in completions] if len(calls) % 2 else None

    run = guarded(trainer, correct=sometimes, refresh_steps=1)
    assert run.error is None
    assert_same(run, references.of("lm"))
