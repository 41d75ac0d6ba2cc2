"""What a user reads."""

import dataclasses
import json
import types
from datetime import datetime, timedelta

import pytest
import torch

from passk_guard import ConflictEstimate
from passk_guard.reporting import Journal, Reporter, describe_estimate, estimate_metrics
from passk_guard.reporting import reporter as reporter_module
from passk_guard.reporting.log_rows import log_row, state_change

COMMON = {"k": 8, "confidence": 0.95, "threshold": 0.0, "num_prompts": 192, "num_informative": 150, "num_refreshes": 3}
CONFLICT = ConflictEstimate(
    status="conflict",
    reason="",
    cosine=-0.31,
    ci_low=-0.44,
    ci_high=-0.17,
    k_star=2,
    pass_at_1=0.5,
    pass_at_1_se=0.02,
    pass_at_k=0.8,
    pass_at_k_se=0.01,
    mean_weighted_agreement=-0.2,
    mean_weight=2.0,
    frac_negative_pairs=0.4,
    **COMMON,
)
SILENT = ConflictEstimate(status="undetermined", reason="the probe holds no pass@8 signal", **COMMON)


def test_the_line_of_the_design():
    assert state_change(240, "conflict", CONFLICT, "observe") == (
        "passk_guard step 240: CONFLICT cos(pass@1, pass@8) = -0.31, 95% CI [-0.44, -0.17], 3 refreshes pooled; "
        "k* = 2; action: observe"
    )
    assert "not held out" in state_change(240, "conflict", CONFLICT, "observe", held_out=False)
    lost = dataclasses.replace(CONFLICT, reason="the probe cannot tell")
    assert "k* = 2; the probe cannot tell; action" in state_change(300, "undetermined", lost, "observe")
    assert state_change(300, "undetermined", SILENT, "observe") == (
        "passk_guard step 300: UNDETERMINED cos(pass@1, pass@8): the probe holds no pass@8 signal; action: observe"
    )


def test_no_number_where_there_is_none():
    assert describe_estimate(SILENT) == "cos(pass@1, pass@8) undetermined: the probe holds no pass@8 signal"
    metrics = estimate_metrics(SILENT, "undetermined")
    assert metrics["cosine"] is None
    assert metrics["conflict"] is None
    assert log_row(metrics) == {}


def test_metric_names():
    row = log_row(estimate_metrics(CONFLICT, "conflict"))
    assert row["passk_guard/cosine"] == -0.31
    assert row["passk_guard/pass_at_8"] == 0.8
    assert row["passk_guard/agreement"] == -0.1
    assert row["passk_guard/conflict"] == 1.0
    assert not any("@" in name for name in row)
    assert all(isinstance(value, float) for value in row.values())


def test_the_journal_is_json_whatever_it_is_given(tmp_path):
    journal = Journal(tmp_path / "deep" / "passk_guard.jsonl")
    journal.write("refresh", 3, a=float("nan"), b=torch.tensor([1.0, float("inf")]), c={"k": (1, None)}, d=object)
    journal.write("failed_refresh", 4, reason='quote " and\nnewline')
    lines = (tmp_path / "deep" / "passk_guard.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert datetime.fromisoformat(first["time"]).utcoffset() == timedelta(0)
    assert first | {"d": 0, "time": ""} == {
        "time": "",
        "event": "refresh",
        "step": 3,
        "a": None,
        "b": [1.0, None],
        "c": {"k": [1, None]},
        "d": 0,
    }
    assert second["reason"] == 'quote " and\nnewline'
    Journal(None).write("refresh", 1)


def test_a_verdict_that_the_two_sided_interval_does_not_explain_names_what_decided():
    """The verdict is one-sided: a conflict may be established with a two-sided interval that touches the threshold."""
    bound = "upper 95% bound -0.02 is below the threshold 0"
    wide = dataclasses.replace(CONFLICT, ci_high=0.05, reason=bound)
    assert bound in state_change(10, "conflict", wide, "observe")
    narrow = dataclasses.replace(CONFLICT, ci_high=-0.05, reason=bound)
    assert bound not in state_change(10, "conflict", narrow, "observe")


@pytest.mark.parametrize(
    ("kind", "before", "after", "expected"),
    [
        ("change", "undetermined", "conflict", "WARN CONFLICT"),
        ("change", "conflict", "clear", "INFO CONFLICT is over, CLEAR"),
        ("change", "undetermined", "clear", ""),
        ("outcome", "holding", "losing", "ERROR LOSING"),
        ("outcome", "losing", "undetermined", "INFO LOSING is over, UNDETERMINED"),
        ("outcome", "undetermined", "gaining", ""),
        ("outcome", "holding", "undetermined", ""),
    ],
)
def test_alerts_worth_paging_for(kind, before, after, expected, tmp_path, monkeypatch):
    sent, posted = [], []
    monkeypatch.setattr(reporter_module, "send_alert", lambda title, text, _, level: sent.append((title, text, level)))
    monkeypatch.setattr(reporter_module.Webhook, "send", lambda _, text: posted.append(text))
    state = types.SimpleNamespace(global_step=0, is_world_process_zero=True)
    args = types.SimpleNamespace(output_dir=str(tmp_path), report_to=[])
    reporter = Reporter(types.SimpleNamespace(log=print, state=state, args=args), held_out=True)
    if kind == "change":
        reporter.change(5, CONFLICT, before=before, after=after, action="observe", advice="set `gamma`")
    else:
        reporter.outcome(5, before=before, after=after, message="pass@1 -0.1", advice="set `gamma`")
    found = [f"{level} {title.removeprefix('passk_guard: ')}" for title, _, level in sent]
    assert found == [expected] * bool(expected)
    assert posted == [f"{title}\n{text}" for title, text, _ in sent]
    if expected.startswith(("WARN", "ERROR")):
        assert "\nWhat to do: set `gamma`\n" in sent[0][1]
    state.is_world_process_zero = False
    reporter.outcome(6, before="holding", after="losing", message="on another rank")
    assert len(sent) == bool(expected)
