"""A GRPO run on the interference task and its report: evaluating changes nothing, and the claim is checked."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers.utils import logging as transformers_logging

pytest.importorskip("trl")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from matplotlib.figure import Figure

from examples.interference import demo, report
from examples.interference import train as train_module
from examples.interference.model import make_model
from examples.interference.tokenizer import make_tokenizer
from examples.interference.train import build_trainer, train
from passk_guard.mitigation.objective import PassKObjective

SMALL = {"per_device_train_batch_size": 32, "num_generations": 8, "report_to": "none", "disable_tqdm": True}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=0, hidden=16, layers=1, heads=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def starts_with_a_letter(completions: list[str], **_: object) -> list[float]:
    """Even a random model is right about half of the time, so that there is something to learn."""
    return [float(text[:1].isalpha()) for text in completions]


def test_exact_evaluation_leaves_the_run_as_it_was(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "correct", starts_with_a_letter)
    watched, records = train(model_dir, tmp_path / "a", steps=2, k=2, evaluate_every=1, seed=3, **SMALL)
    after_watched = torch.get_rng_state()
    alone = build_trainer(model_dir, tmp_path / "b", steps=2, seed=3, **SMALL)
    before = [p.clone() for p in alone.model.parameters()]
    with PassKObjective(alone, k=2):
        alone.train()
    after = list(alone.model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(watched.model.parameters(), after, strict=True))
    assert torch.equal(after_watched, torch.get_rng_state())

    assert [r["step"] for r in records] == [0, 1, 2]
    logged = {row["step"]: row["exact/pass_at_2"] for row in watched.state.log_history if "exact/pass_at_2" in row}
    assert logged == pytest.approx({r["step"]: r["pass_at_2"] for r in records})
    # The step's own row still holds what TRL logs.
    assert all("rewards/starts_with_a_letter/mean" in row for row in watched.state.log_history if row["step"] == 1)


def records(pass_1: list[float], pass_8: list[float]) -> list[dict[str, float]]:
    rows = []
    for i, (one, eight) in enumerate(zip(pass_1, pass_8, strict=True)):
        rows.append({"step": 10 * i, "cosine": -0.4})
        for prefix in ("", "easy/", "hard/", "neutral/"):
            rows[-1] |= {f"{prefix}pass_at_1": one, f"{prefix}pass_at_8": eight}
    return rows


def alarm(step: int) -> dict:
    return {"event": "state", "step": step, "from": "undetermined", "to": "conflict", "message": ""}


def loss(step: int) -> dict:
    return {"event": "outcome", "step": step, "from": "undetermined", "to": "losing", "message": f"step {step}: LOSING"}


def change(step: int, level_1: float | None, level_8: float | None) -> dict:
    levels = {"pass_at_1": level_1, "pass_at_1_se": 0.02, "pass_at_8": level_8, "pass_at_8_se": 0.03}
    return {"event": "change", "step": step} | levels


def refresh(step: int, status: str, cosine: float | None, low: float | None, high: float | None) -> dict:
    bounds = {"cosine": cosine, "cosine_ci_low": low, "cosine_ci_high": high}
    return {"event": "refresh", "step": step, "status": status} | bounds


REFRESHES = [
    refresh(0, "undetermined", None, None, None),
    refresh(5, "conflict", -0.5, -0.8, -0.2),
    refresh(15, "conflict", -0.3, -0.6, -0.1),
    change(5, 0.55, 0.75),
    change(10, None, None),
    change(15, 0.45, 0.85),
]


@pytest.mark.parametrize(
    ("pass_1", "pass_8", "events", "failure"),
    [
        ([0.6, 0.5, 0.4], [0.7, 0.8, 0.9], [alarm(5), loss(8)], None),
        ([0.6, 0.5, 0.4], [0.7, 0.8, 0.9], [loss(8), alarm(15), alarm(18)], "CONFLICT came late, at step 15: only 25%"),
        ([0.6, 0.5, 0.4], [0.7, 0.8, 0.9], [alarm(5), loss(15), loss(18)], "LOSING came late, at step 15: only 25%"),
        ([0.6, 0.5, 0.4], [0.7, 0.8, 0.9], [loss(8)], "never said CONFLICT"),
        ([0.6, 0.5, 0.4], [0.7, 0.8, 0.9], [alarm(5)], "never said LOSING"),
        ([0.6, 0.5, 0.6], [0.7, 0.8, 0.9], [alarm(5), loss(8)], "pass@1 did not fall: 0.600 -> 0.600"),
        ([0.6, 0.5, 0.4], [0.7, 0.8, 0.7], [alarm(5), loss(8)], "pass@8 did not rise: 0.700 -> 0.700"),
    ],
)
def test_claim_of_the_demo_is_checked(pass_1, pass_8, events, failure):
    summary = report.summarise(records(pass_1, pass_8), events, k=8)
    failures = summary.failures()
    if failure is None:
        assert summary.conflict == (5, pytest.approx(0.75))
        assert summary.losing == (8, pytest.approx(0.6))
    assert [failure in text for text in failures] == ([True] if failure else [])


def test_files_of_a_report(tmp_path, capsys):
    from rich.console import Console

    rows, events = records([0.6, 0.5, 0.4], [0.7, 0.8, 0.9]), [*REFRESHES, alarm(5), loss(15)]
    guard_log = tmp_path / "passk_guard.jsonl"
    guard_log.write_text("".join(json.dumps(e) + "\n" for e in events))
    assert report.read_events(guard_log) == events

    summary = report.summarise(rows, events, k=8)
    report.write_results(tmp_path / "results.jsonl", rows, summary)
    lines = report.read_events(tmp_path / "results.jsonl")
    assert [line["event"] for line in lines] == ["exact", "exact", "exact", "summary"]

    report.draw(tmp_path / "demo.png", rows, events, k=8, guarded=rows)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")

    report.print_table(Console(width=120), "seed 0", rows, summary)
    report.print_alarms(Console(width=120), summary, events)
    printed = capsys.readouterr().out
    assert "step 15: LOSING\n" in printed
    table = [re.findall(r"[\w%]+", line) for line in printed.splitlines()]
    assert ["LOSING", "15", "25%"] in table
    assert ["CONFLICT", "5", "75%"] in table


def test_a_run_without_alarms_has_a_table_all_the_same(capsys):
    from rich.console import Console

    summary = report.summarise(records([0.5, 0.6], [0.7, 0.8]), [loss(5)], k=8)
    report.print_alarms(Console(width=120), summary, [loss(5)])
    table = [re.findall(r"[\w%-]+", line) for line in capsys.readouterr().out.splitlines()]
    assert ["LOSING", "5", "-"] in table
    assert ["CONFLICT", "never", "-"] in table


def test_the_picture_shows_what_the_guard_measured():
    axes = Figure().subplots()
    report._draw_measured(axes, REFRESHES, "pass_at_1", "black")
    (dots,), (band,) = axes.lines, axes.collections
    assert dots.get_xydata().tolist() == [[5, 0.55], [15, 0.45]]
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert (low, high) == pytest.approx((0.45 - 1.96 * 0.02, 0.55 + 1.96 * 0.02))


def test_demo_reads_what_the_guard_writes(model_dir, tmp_path, monkeypatch, capsys):
    """The whole demo on a tiny model: its claim fails there, but every file is written and every name is known."""
    for module in (train_module, demo):
        monkeypatch.setattr(module, "correct", starts_with_a_letter)
    monkeypatch.setattr(demo, "STEPS", 6)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # it would last beyond this test
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)  # put back afterwards
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "seed4").symlink_to(model_dir)
    out = tmp_path / "out"
    argv = ["demo", "--out", str(out), "--cache", str(tmp_path / "cache"), "--seeds", "4"]
    monkeypatch.setattr("sys.argv", argv)
    assert demo.main() == 1

    events = report.read_events(out / "seed4" / "observe" / "passk_guard.jsonl")
    seen = [e for e in events if e["event"] == "refresh"]
    assert [e["step"] for e in seen] == [0, 5]
    assert [(e["since"], e["step"]) for e in events if e["event"] == "change"] == [(0, 5)]
    assert all(e["inner_product"] is not None for e in seen)
    exact = report.read_events(out / "seed4" / "observe" / "results.jsonl")
    assert [line["step"] for line in exact[:-1]] == [0, 2, 4, 6]
    assert (out / "seed4" / "demo.png").exists()
    assert (out / "seed4" / "project" / "results.jsonl").exists()
    assert list((out / "seed4" / "observe" / "tensorboard").rglob("events.out.tfevents.*"))
    printed = capsys.readouterr()
    assert "Plan: 0 warm start(s)" in printed.out
    assert "it/s" not in printed.err, "no bar where nobody watches a terminal"
    assert "The demo did not show its claim. seed 4:" in printed.err


def test_claim_of_the_guarded_run_is_checked():
    held = report.summarise(records([0.6, 0.6, 0.59], [0.7, 0.8, 0.9]), [], k=8)
    assert held.guarded_failures() == []
    lost = report.summarise(records([0.6, 0.5, 0.5], [0.7, 0.8, 0.7]), [], k=8)
    assert [text.split(",")[1].split()[0] for text in lost.guarded_failures()] == ["pass@1", "pass@8"]
