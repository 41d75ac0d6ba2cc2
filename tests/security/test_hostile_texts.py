"""Prompts, completions and reasons are data: on a page, in a terminal and in a log they are shown and never heeded."""

import html
import io
import json
import logging
import re
import sys
import types

import pytest
import torch

from passk_guard.analysis import analyze
from passk_guard.analysis.page import analysis_page
from passk_guard.analysis.words import print_analysis
from passk_guard.cli import main
from passk_guard.probe.verifier import Verifier
from passk_guard.reporting import Reporter
from passk_guard.reporting.html.page import SCRIPT
from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.ranks import Ranks
from tests.analysis.cases import QUICK, PromptSampler
from tests.helpers.hostile import HIDING, HOSTILE, PAYLOADS, Page
from tests.helpers.journals import write_run
from tests.helpers.tiny import digit_reward, tiny_model, tiny_tokenizer
from tests.probe.test_verifier import rollouts

ELEMENTS = """html head meta title style body main h1 h2 h3 p nav ul li a section div dl dt dd table caption thead tbody
tr th td button details summary figure figcaption script fieldset legend label input i"""
ATTRIBUTES = """charset http-equiv content name lang class id href role aria-label aria-hidden tabindex scope type
data-sort data-run checked download"""


def check(text):
    """Only our own elements, our own script, and no control characters; returns what is shown."""
    page = Page(text)
    assert set(page.elements) <= set(ELEMENTS.split())
    assert page.attributes <= set(ATTRIBUTES.split())
    assert page.script.strip() == SCRIPT.strip()
    assert all("<" not in block for block in page.blocks), "a data block could end early"
    assert all(link.startswith(("#", "data:text/csv;", "data:application/json;")) for link in page.links)
    assert not re.search(HIDING, text)
    assert "default-src 'none'" in text
    return page.text


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    """From a probe file, through sampling and scoring, as `analyze` does it."""
    probe = tmp_path_factory.mktemp("hostile") / "probe.jsonl"
    rows = [{"prompt": f"{payload} {i}"[:60] or "x"} for i, payload in enumerate(PAYLOADS)]
    probe.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_model(max_position_embeddings=256)
    return analyze(
        model,
        tiny_tokenizer(),
        probe,
        digit_reward,
        sampler=PromptSampler(),
        name=PAYLOADS[0] + PAYLOADS[5] + PAYLOADS[7],
        **QUICK,
    )


def test_the_page_of_an_analysis(analysis, tmp_path):
    shown = check(analysis_page(analysis.to_dict()))
    assert "<img src=x onerror=" in shown
    assert html.unescape("[bold red]x[/]") in shown
    analysis.save(tmp_path)
    check((tmp_path / "analysis.html").read_text(encoding="utf-8"))


def test_the_page_of_a_run(tmp_path):
    settings = {payload: payload for payload in PAYLOADS}
    write_run(tmp_path / PAYLOADS[1].replace("/", "_")[:40], hostile=True, guarded=True, settings=settings)
    run = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert main(["report", str(run), str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert "document.title='broken'" in check((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_the_terminal(analysis):
    out = io.StringIO()
    print_analysis(analysis, out)
    said = out.getvalue()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", said)
    assert "[bold red]" in said
    assert "{0.__class__}" in re.sub(r"\s|[│┃]", "", said)


def test_an_error_on_the_command_line_is_one_line(tmp_path, capsys):
    path = tmp_path / "guard.json"
    path.write_text(json.dumps({payload: payload for payload in PAYLOADS}))
    assert main(["check", str(path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(PAYLOADS)
    assert all(line.startswith("passk-guard: error: ") and line.isprintable() for line in lines)
    probe = tmp_path / "probe.jsonl"
    probe.write_text("".join(json.dumps({payload: payload}) + "\n" for payload in PAYLOADS))
    given = ["--probe", str(probe), "--correct", "tests.helpers.tiny:digit_reward", "--out", str(tmp_path / "out")]
    assert main(["analyze", str(tmp_path), *given]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()


@pytest.fixture
def reporter(tmp_path):
    state = types.SimpleNamespace(global_step=0, is_world_process_zero=True)
    args = types.SimpleNamespace(output_dir=str(tmp_path), report_to=["trackio"])
    made = Reporter(types.SimpleNamespace(log=print, state=state, args=args), held_out=True)
    made.open()
    return made


@pytest.mark.parametrize("payload", [*PAYLOADS, HOSTILE])
def test_a_log_line_an_alert_and_a_line_of_the_journal_are_one_line(payload, reporter, caplog, tmp_path, monkeypatch):
    def raises(completions, **_):
        raise ValueError(payload)

    alerts = []
    tracker = types.SimpleNamespace(AlertLevel=types.SimpleNamespace(WARN=0), alert=lambda **kw: alerts.append(kw))
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    with pytest.raises(FailedRefresh) as failed:
        Ranks(torch.device("cpu")).together(lambda: Verifier(raises).score(rollouts([payload, payload])))
    with caplog.at_level(logging.INFO):
        reporter.failed_refresh(0, str(failed.value), streak=1, alert_after=1)
        reporter.failed_refresh(1, payload, streak=2, alert_after=2)
        reporter.warn(payload)
        reporter.info(payload)
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert len(alerts) == 2
    for alert in alerts:
        evidence, cost = alert["text"].split("\n")
        assert all(text.isprintable() for text in (alert["title"], evidence, cost))
    events = [json.loads(line) for line in (tmp_path / "passk_guard.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["failed_refresh"] * 2
    assert events[1]["reason"] == payload
