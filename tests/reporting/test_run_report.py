"""The page of a run says what its journal says."""

import json
import re
from itertools import pairwise

import pytest

from passk_guard.reporting.html.page import page_kind
from passk_guard.reporting.journal import read_journal
from passk_guard.reporting.run_charts import NO_REFRESH, Run
from passk_guard.reporting.run_report import KIND, report
from passk_guard.utils.errors import GuardError
from tests.helpers.hostile import Page
from tests.helpers.journals import EARLIER, write_run


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "observed")


def headings(page):
    return re.findall(r"<h2>([^<]*)</h2>", page)


def test_the_columns_are_those_of_the_journal(folder):
    run = Run("r", read_journal(folder))
    written = [json.loads(text) for text in (folder / "passk_guard.jsonl").read_text().splitlines()]
    refreshes = [e for e in written if e["event"] in ("refresh", "failed_refresh")]
    assert run.steps == [e["step"] for e in refreshes]
    assert run.column("cosine") == [e.get("cosine") for e in refreshes]
    assert run.column("pass_at_8") == [e.get("pass_at_8") for e in refreshes]
    assert run.column("cosine")[0] is None
    assert run.column("pass_at_1")[9:13] == [None] * 4, "failed refreshes are gaps"
    assert run.ks == [8]
    assert run.confidence == 0.95


def test_the_verdicts_cover_the_run_without_overlap(folder):
    spans = Run("r", read_journal(folder)).spans
    assert [s.start for s in spans] == [5 * i for i in range(20)]
    assert all(a.end == b.start for a, b in pairwise(spans))
    states = ["undetermined"] * 3 + ["conflict"] * 6 + ["failed refresh"] * 4 + ["conflict"] * 3 + ["clear"] * 4
    assert [s.state for s in spans] == states


def test_the_alerts_are_changes_of_verdict_and_failed_refreshes(folder, tmp_path):
    run, alerts = Run("r", read_journal(folder)), [(15, "CONFLICT"), (55, NO_REFRESH)]
    assert [(step, kind) for step, kind, _ in run.alerts] == alerts
    assert [(step, kind) for step, kind, _ in run.changes] == [*alerts, (80, "CLEAR")], "which pages nobody"
    other = write_run(tmp_path / "patient", settings={"failed_refresh_alert": 4})
    assert [step for step, kind, _ in Run("r", read_journal(other)).alerts if kind == NO_REFRESH] == [60]


def test_a_page_of_one_run(folder):
    page = report(folder).html
    expected = ["Pass rates and cosine", "Verdicts and alerts", "Interference", "Failed refreshes", "All refreshes"]
    assert headings(page) == expected
    assert page.count('role="img"') == 6, "rates, cosine, verdicts, k*, agreement, negative pairs"
    text = Page(page).text
    assert "0.600 → 0.448" in text
    assert "0.30 [0.05, 0.50]" in text
    assert "Refreshes by state. verdict: 9 conflict, 4 clear, 3 undetermined, 4 failed refresh" in text
    assert text.count("every reward call failed") >= 4


def test_mitigation_and_settings_where_there_are_any(tmp_path):
    folder = write_run(tmp_path / "guarded", guarded=True, settings={"k": 8, "gamma": 0.2})
    page = report(folder).html
    assert "Mitigation" in headings(page)
    assert "Settings" in headings(page)
    assert page.count('role="img"') == 6 + 4, "train cosine, share changed, coefficient, floor"
    assert "It took 2 ms a step" in page


def test_two_runs_over_each_other(folder, tmp_path):
    other = write_run(tmp_path / "guarded", guarded=True)
    found = report(folder, other)
    page = found.html
    assert "<title>passk_guard: observed and guarded</title>" in page
    for name in ("pass@1, observed", "pass@1, guarded", "pass@8, guarded", "cosine, observed", "verdict, guarded"):
        assert f"{name}<" in page
    assert page.count("<caption>Refreshes of ") == 2
    deep = [write_run(tmp_path / x / "run", refreshes=3) for x in "ab"]
    assert "a/run and b/run" in report(*deep).html
    assert "observed (A) and observed (B)" in report(folder, folder).html


def test_the_page_names_what_is_missing(folder):
    journal = folder / "passk_guard.jsonl"
    whole = journal.read_text()
    journal.write_text(whole + '{"event": "refr')
    assert "half written" in report(folder).html
    journal.write_text(whole + whole.splitlines()[4] + "\n")
    assert "The run began again at step" in report(folder).html
    journal.write_text('{"event": "failed_refresh", "step": 0, "reason": "out of memory", "streak": 1}\n')
    page = report(folder).html
    assert "The newest refresh failed: out of memory" in page
    assert "No verdict changed" in page
    journal.write_text('{"event": "refresh", "step": 0, "held_out": false}\n')
    assert "not held out" in report(folder).html


@pytest.mark.parametrize("value", ["much", True, [1], 10**400, {}, None])
def test_a_field_of_another_type_is_no_number(value, folder):
    journal = folder / "passk_guard.jsonl"
    event = {"event": "refresh", "step": 200, "verdict": value, "cosine": value, "pass_at_1": value, "held_out": value}
    journal.write_text(journal.read_text() + json.dumps(event) + "\n")
    run = Run("r", read_journal(folder))
    assert run.column("cosine")[-1] is run.column("pass_at_1")[-1] is None
    assert run.verdict == "undetermined"
    assert "much" not in Page(report(folder).html).text


def test_saving(folder, tmp_path):
    found, path = report(folder), tmp_path / "page.html"
    assert found.save(path) == path
    assert page_kind(path.read_text(encoding="utf-8"), KIND)
    found.save(path)  # our own is replaced
    path.write_text("my notes")
    with pytest.raises(GuardError, match="exists and is not a page of this command"):
        found.save(path)
    assert path.read_text() == "my notes"
    found.save(path, force=True)
    assert path.read_text(encoding="utf-8") == found.html
    with pytest.raises(GuardError, match="found the folder"):
        found.save(tmp_path)
    with pytest.raises(GuardError, match="Cannot write"):
        found.save(tmp_path / "missing" / "page.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["observed", "page.html"], "nothing is left beside"


def test_a_notebook_shows_the_page_in_a_frame(folder):
    shown = report(folder)._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "<h2>" not in shown, "the page is in an attribute, escaped"


@pytest.mark.parametrize("path", EARLIER, ids=lambda path: path.stem)
def test_the_journal_of_an_earlier_version(path):
    run = Run("r", read_journal(path))
    written = [json.loads(text) for text in path.read_text().splitlines()]
    refreshes = [e for e in written if e["event"] == "refresh"]
    assert run.column("cosine") == [e["cosine"] for e in refreshes]
    assert run.journal.settings == written[0]["settings"]
    assert [text for _, _, text in run.changes] == [e["message"] for e in written if e["event"] == "state"]
    assert Page(report(path).html).elements.count("tr") > len(refreshes) + len(run.journal.settings)


def test_the_journal_of_a_real_run(tmp_path):
    from passk_guard import GuardConfig, PassKGuardCallback
    from tests.helpers.tiny import digit_reward, probe_rows, tiny_lm_trainer

    trainer = tiny_lm_trainer(tmp_path, max_steps=3)
    config = GuardConfig(k=2, num_samples=4, probe_prompts=8, refresh_steps=1, sketch_dim=256, probe_max_new_tokens=2)
    trainer.add_callback(PassKGuardCallback(trainer, probe_rows(), digit_reward, config))
    trainer.train()
    page = report(tmp_path).html
    rates = [e["pass_at_1"] for e in read_journal(tmp_path).of("refresh")]
    assert len(rates) == 3
    assert f"{rates[0]:.3f} → {rates[-1]:.3f}" in Page(page).text


def window(since, step, change, **fields):
    rates = [{"low": low, "high": low + 0.33, "share": 0.3, "pass_at_1": x} for low, x in ((0.0, 0.01), (0.66, change))]
    rates.insert(1, {"low": 0.33, "high": 0.66, "share": 0.0, "pass_at_1": None})
    numbers = {"pass_at_1_change": change, "pass_at_1_change_se": 0.004, "pass_at_1_total": change, "k": 8}
    return (
        {"event": "change", "step": step, "since": since, "outcome": "losing", "solve_rates": rates} | numbers | fields
    )


def test_the_page_says_what_the_updates_did(folder):
    events = [window(0, 5, -0.02, lost=[["an <easy> one", -0.3]], gained=[["a hard one", 0.2]])]
    events += [window(5, 10, -0.01, lost=[["another", -0.4], "no pair"], pass_at_8_total=0.03, missed=2)]
    events += [{"event": "outcome", "step": 10, "from": "undetermined", "to": "losing", "message": "LOSING pass@1"}]
    with (folder / "passk_guard.jsonl").open("w") as file:
        file.writelines(
            json.dumps(event) + "\n" for event in [{"event": "refresh", "step": 0, "pass_at_8": 0.5}, *events]
        )
    run = Run("r", read_journal(folder))
    assert [event["step"] for event in run.windows] == [5, 10]
    assert run.movers("lost") == [(10, "another", -0.4), (5, "an <easy> one", -0.3)]
    assert run.movers("gained") == [(5, "a hard one", 0.2)]
    assert run.by_solve_rate == [("hard", 0.02), ("medium", 0.0), ("easy", pytest.approx(-0.03))]
    assert [(step, kind) for step, kind, _ in run.alerts] == [(10, "LOSING")]
    page = report(folder).html
    assert "What the updates did" in headings(page)
    total = "Change of pass@8 since the start (2 windows missed)"
    for text in ("an &lt;easy&gt; one", "Who pays", total, "LOSING pass@1"):
        assert text in page


def test_a_run_without_windows_has_no_such_section(folder):
    assert "What the updates did" not in headings(report(folder).html)
