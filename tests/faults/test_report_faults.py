"""Disks that are full, trackers and log handlers that raise: less is told, and training is that of no guard."""

import json
import logging
import sys
import types
from pathlib import Path

import pytest
import torch

from passk_guard import GuardError, report
from passk_guard.cli import main
from passk_guard.reporting.journal import Journal
from tests.faults.harness import PROJECT, At, Texts, add_guard, assert_same, make, train

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


def fill_the_disk(monkeypatch):
    """What is appended to a journal meets a disk that is full."""
    opened = Path.open
    full = "passk_guard.jsonl"
    monkeypatch.setattr(
        Path, "open", lambda p, mode="r", **k: opened(FULL if p.name == full and mode == "a" else p, mode, **k)
    )


@needs_full
def test_a_full_disk_at_the_journal(references, tmp_path, caplog, monkeypatch):
    fill_the_disk(monkeypatch)
    trainer = make("lm", tmp_path)
    run = train(trainer, add_guard(trainer, sampler=Texts(trainer.processing_class), refresh_steps=1))
    assert caplog.text.count("takes no more events") == 1
    arguments = [argument for record in caplog.records for argument in record.args or ()]
    assert not any(isinstance(one, BaseException) for one in arguments), "its frames would live as long as the record"
    assert "No space left on device" in caplog.text
    assert run.guard.estimate is not None
    assert any("passk_guard/pass_at_1" in row for row in trainer.state.log_history)
    assert_same(run, references.of("lm"))


def test_a_line_cut_short_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "passk_guard.jsonl"
    journal = Journal(path)
    journal.write("refresh", 0, cosine=0.5)
    whole = path.read_text()
    opened = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[:20])
            self.file.flush()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        Path, "open", lambda p, mode="r", **k: Full(opened(p, mode, **k)) if mode == "a" else opened(p, mode, **k)
    )
    journal.write("refresh", 1, cosine=0.5)
    monkeypatch.undo()
    assert path.read_text() == whole


@pytest.mark.parametrize("rest", ['{"event": "refr', '{"event": "refresh", "step": 3}', "\n\n{", "é" * 10])
def test_what_a_crash_left_of_a_line_is_gone_before_the_next(rest, tmp_path):
    path = tmp_path / "passk_guard.jsonl"
    Journal(path).write("refresh", 0, verdict="clear")
    whole = path.read_text()
    path.write_text(whole + rest)
    Journal(path).write("failed_refresh", 5, reason="r")
    events = [json.loads(line) for line in path.read_text().splitlines() if line]
    assert [e["step"] for e in events] == [0, 5]
    assert report(tmp_path).journals[0].events


@needs_full
def test_a_full_disk_at_the_page_of_a_report(tmp_path, capsys):
    Journal(tmp_path / "passk_guard.jsonl").write("refresh", 0, verdict="clear", status="clear")
    with pytest.raises(GuardError, match=r"Cannot write|exists and is not"):
        report(tmp_path).save(FULL)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "nowhere" / "page.html")]) != 0
    assert "Cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("mitigation", [{}, PROJECT], ids=["observe", "project"])
def test_a_full_disk_at_the_checkpoint(mitigation, tmp_path, monkeypatch, caplog, references):
    save = torch.save

    def full(content, path, *args, **kwargs):
        if "passk_guard" in str(path):
            Path(path).write_bytes(b"PK")
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        return save(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    trainer = make("lm", tmp_path, save_strategy="steps", save_steps=2)
    # Learns to fail at everything: with nothing to protect, no step is turned.
    run = train(trainer, add_guard(trainer, correct=lambda completions, **_: [0.0] * len(completions), **mitigation))
    assert run.error is None
    assert "the checkpoint holds no memory of the guard" in caplog.text
    assert not list(tmp_path.glob("checkpoint-*/passk_guard*")), "nothing half written is left"
    assert list(tmp_path.glob("checkpoint-*/model.safetensors"))
    assert_same(run, references.of("lm"))


def test_a_checkpoint_folder_that_is_gone(references, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("passk_guard.callback.guard._checkpoint", lambda args, state: tmp_path / "never made")
    trainer = make("lm", tmp_path, save_strategy="steps", save_steps=2)
    run = train(trainer, add_guard(trainer, sampler=Texts(trainer.processing_class)))
    assert "the checkpoint holds no memory of the guard" in caplog.text
    assert_same(run, references.of("lm"))


class Broken(types.ModuleType):
    """A tracker that takes nothing."""

    AlertLevel = types.SimpleNamespace(WARN="warn")
    run = object()

    def alert(self, *_, **__):
        raise ConnectionError("the tracker is down")

    log = Image = alert


class Explosive(types.ModuleType):
    """A module of which not even an attribute can be read."""

    def __getattribute__(self, name):
        raise ConnectionError("the tracker is down")


@pytest.mark.parametrize("tracker", [Broken, Explosive])
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_raises(name, tracker, references, tmp_path, monkeypatch, caplog):
    trainer = make("lm", tmp_path)
    sampler = Texts(trainer.processing_class)
    calls = []

    def sometimes(completions, **_):
        calls.append(1)
        if len(calls) > 2:
            raise ValueError
        return [float(c.isdigit()) for c in completions]

    guard = add_guard(
        trainer, sampler=sampler, correct=sometimes, refresh_steps=1, image_refreshes=1, failed_refresh_alert=1
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
    assert [e["event"] for e in run.events if e["event"] in ("refresh", "failed_refresh")] == ["refresh"] * 2 + [
        "failed_refresh"
    ] * 2
    assert_same(run, references.of("lm"))


def test_a_tensorboard_writer_that_raises(references, tmp_path, caplog):
    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    trainer = make("lm", tmp_path)
    trainer.callback_handler.callbacks[0].tb_writer = types.SimpleNamespace(add_image=broken)
    run = train(trainer, add_guard(trainer, sampler=Texts(trainer.processing_class), image_refreshes=1))
    assert "tensorboard did not take the pictures" in caplog.text
    assert len(run.of("refresh")) == 2
    assert_same(run, references.of("lm"))


class Raising(logging.Handler):
    """A handler that sends lines elsewhere and fails, past logging's own net."""

    def emit(self, record):
        raise ConnectionError("the log server is down")


@pytest.mark.parametrize("config", [{}, PROJECT], ids=["observe", "project"])
def test_a_log_handler_that_raises(config, references, tmp_path):
    def broken(completions, **_):
        raise ValueError("no verdict")

    trainer = make("lm", tmp_path, save_strategy="steps", save_steps=2)
    handler = Raising()
    logging.getLogger("passk_guard").addHandler(handler)
    try:
        run = train(trainer, add_guard(trainer, correct=broken, sampler=Texts(trainer.processing_class), **config))
    finally:
        logging.getLogger("passk_guard").removeHandler(handler)
    assert run.error is None
    assert len(run.of("failed_refresh")) == 2
    assert_same(run, references.of("lm"))


@pytest.mark.parametrize("method", ["refresh", "change", "failed_refresh", "warn", "info"])
def test_any_part_of_a_report_that_raises(method, references, tmp_path, monkeypatch, caplog):
    targets = {
        "refresh": "passk_guard.reporting.reporter.estimate_metrics",
        "change": "passk_guard.reporting.reporter.state_change",
        "failed_refresh": "passk_guard.reporting.reporter.one_line",
        "warn": "passk_guard.reporting.reporter.Journal.write",
        "info": "passk_guard.reporting.log_rows.log_row",
    }

    def broken(*_, **__):
        raise ArithmeticError("not foreseen")

    monkeypatch.setattr(targets[method], broken)
    trainer = make("lm", tmp_path)
    calls = []

    def sometimes(completions, **_):
        calls.append(1)
        return [float(c.isdigit()) for c in completions] if len(calls) % 2 else None

    guard = add_guard(trainer, correct=sometimes, sampler=Texts(trainer.processing_class), refresh_steps=1)
    run = train(trainer, guard)
    assert run.error is None
    assert_same(run, references.of("lm"))
