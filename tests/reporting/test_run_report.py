"""The page of a run says what its journal says."""

import base64
import csv
import io
import json
import re
from itertools import pairwise

import plotly.graph_objects as go
import pytest

from passk_guard.reporting.html.page import page_kind
from passk_guard.reporting.journal import read_journal
from passk_guard.reporting.run import FAILED, NO_REFRESH, RECOMMENDED, Run
from passk_guard.reporting.run_charts import further_figure, main_figure, who_pays
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
    assert [start for start, _, _ in spans] == [5 * i for i in range(20)]
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    states = ["undetermined"] * 3 + ["conflict"] * 6 + [FAILED] * 4 + ["conflict"] * 3 + ["clear"] * 4
    assert [state for _, _, state in spans] == states


def test_the_alerts_are_changes_of_verdict_and_failed_refreshes(folder, tmp_path):
    run, alerts = Run("r", read_journal(folder)), [(15, "CONFLICT"), (55, NO_REFRESH)]
    assert [(step, kind) for step, kind, _ in run.alerts] == alerts
    assert [(step, kind) for step, kind, _ in run.changes] == [*alerts, (80, "CLEAR")], "which pages nobody"
    other = write_run(tmp_path / "patient", settings={"failed_refresh_alert": 4})
    assert [step for step, kind, _ in Run("r", read_journal(other)).alerts if kind == NO_REFRESH] == [60]


def test_a_page_of_one_run(folder):
    page = report(folder).html
    expected = ["Over training", "Verdicts and alerts", "Further numbers", "All refreshes and windows"]
    assert headings(page) == expected
    text = Page(page).text
    assert "pass@1 from 0.6 to 0.448, between 0.448 and 0.6" in text
    assert "CONFLICT from step 15 to 75." in text
    assert f"Try {RECOMMENDED}." in text
    assert text.count("every reward call failed") >= 4


def test_mitigation_and_settings_where_there_are_any(tmp_path):
    folder = write_run(tmp_path / "guarded", guarded=True, settings={"k": 8, "gamma": 0.2})
    page = report(folder).html
    assert "Settings" in headings(page)
    titles = panels(further_figure([Run("r", read_journal(folder))]))
    assert [title.split()[0] for title in titles] == ["Cosine", "Share", "Coefficient", "k*:", "Mean", "Share"]
    assert "The mitigation took 2 ms a step" in page


def test_two_runs_over_each_other(folder, tmp_path):
    other = write_run(tmp_path / "guarded", guarded=True)
    found = report(folder, other)
    page = found.html
    assert "<title>passk_guard: observed and guarded</title>" in page
    figure = json.loads(Page(page).blocks[0])
    names = {trace.get("name") for trace in figure["data"]}
    assert names >= {"pass@1, observed", "pass@1, guarded", "pass@8, guarded", "cosine, observed", "angle, guarded"}
    assert {trace["meta"]["run"] for trace in figure["data"]} == {0, 1}
    assert page.count('data-run="') == 2
    assert page.count("<caption>Refreshes and windows of ") == 2
    assert Page(report(folder, other, folder).html).text.count("Try mitigation=") == 6, "any number of runs"
    deep = [write_run(tmp_path / x / "run", refreshes=3) for x in "ab"]
    assert "a/run and b/run" in report(*deep).html
    assert "observed (1) and observed (2)" in report(folder, folder).html


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
    assert f"pass@1 from {rates[0]:.4g} to {rates[-1]:.4g}" in Page(page).text


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
    ends = {name: totals[-1] for name, totals in run.by_group.items()}
    assert ends == {"hard": 0.02, "medium": 0.0, "easy": pytest.approx(-0.03)}
    assert [(step, kind) for step, kind, _ in run.alerts] == [(10, "LOSING")]
    page = report(folder).html
    assert "Who pays" in headings(page)
    for text in ("an &lt;easy&gt; one", "(2 windows missed)", "LOSING pass@1"):
        assert text in page


def test_a_run_without_windows_has_no_such_section(folder):
    assert "Who pays" not in headings(report(folder).html)


def total(value, low, high, **fields):
    ends = {"pass_at_1_total": value, "pass_at_1_total_ci_low": low, "pass_at_1_total_ci_high": high}
    more = {"pass_at_8_total": 0.15, "pass_at_8_total_ci_low": 0.1, "pass_at_8_total_ci_high": 0.2}
    return ends | more | fields


def headline(tmp_path, *events, settings=None):
    journal = tmp_path / "passk_guard.jsonl"
    lines = [{"event": "start", "step": 0, "settings": settings or {}}, *events]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Run("r", read_journal(tmp_path)).headline


def test_the_run_in_a_sentence(tmp_path):
    """The worst of the run and not its last, by whom and since when, with intervals, and what to do."""
    refreshes = [
        {"event": "refresh", "step": s, "verdict": v, "pass_at_8": 0.5} for s, v in ((0, "conflict"), (9, "clear"))
    ]
    windows = [window(0, 5, -0.05, **total(-0.05, -0.08, -0.02)), window(5, 10, -0.03, **total(-0.08, -0.11, -0.05))]
    windows.append(window(10, 15, 0.0, **total(-0.08, -0.11, -0.05), outcome="undetermined"))
    sentence, kind = headline(tmp_path, *refreshes, *windows)
    assert kind == "bad"
    assert sentence == (
        "pass@1 fell by 0.08 [0.05, 0.11], mostly on easy prompts, established from step 5 on; "
        "pass@8 rose by 0.15 [0.10, 0.20]. LOSING from step 5 to 10. CONFLICT at step 0. "
        f"Try {RECOMMENDED}."
    )
    sentence, _ = headline(tmp_path, *refreshes[:1], settings={"mitigation": "project"})
    assert sentence == "CONFLICT at step 0. With mitigation='project'."
    sentence, kind = headline(tmp_path, refreshes[1], window(0, 10, 0.0, **total(0.0, -0.01, 0.01), outcome="holding"))
    assert kind == "good"
    assert sentence.startswith("pass@1 did not measurably change: +0.00 [−0.01,\u00a0+0.01]; pass@8 rose")
    assert sentence.endswith(". CLEAR: no conflict.")
    rates = {"pass_at_1_se": 0.03, "pass_at_8": 0.5, "verdict": "undetermined", "confidence": 0.95}
    measured = [{"event": "refresh", "step": s, "pass_at_1": p} | rates for s, p in ((0, 0.6), (9, 0.4))]
    sentence, kind = headline(tmp_path, *measured)
    assert kind == ""
    assert sentence == "pass@1 fell by 0.20 [0.12, 0.28]. UNDETERMINED: the probe cannot tell yet."


def panels(figure):
    return [note["text"][3:-4] for note in figure.layout["annotations"] if note["text"].startswith("<b>")]


def test_the_panels_of_a_run(tmp_path):
    events = [
        {
            "event": "refresh",
            "step": 0,
            "reason": "no <b>signal</b>",
            "hold_multiplier": 0.1,
            "pass_at_8": 0.5,
            "floor": 0.2,
        },
        window(0, 5, -0.1, pass_at_1=0.5, pass_at_1_se=0.01, losing_p_value=0.01, **total(-0.1, -0.2, -0.05)),
        window(5, 9, -0.1, pass_at_1=0.4, pass_at_1_se=0.01, losing_p_value=0.0, groups={"<i>": {"pass_at_1": 0.2}}),
    ]
    headline(tmp_path, *events)
    run = Run("r", read_journal(tmp_path))
    figure = main_figure([run])
    go.Figure(figure.data, figure.layout)
    expected = [
        "Verdicts: of the angle, and of the change",
        "pass@1",
        "pass@8",
        "Change of pass@1, per window and in total",
    ]
    assert panels(figure)[:4] == expected
    texts = [note["text"] for note in figure.layout["annotations"]]
    assert "Not determined at any refresh: no &lt;b&gt;signal&lt;/b&gt;" in texts, "an empty plot says why"
    by_name = {trace.get("name"): trace for trace in figure.data}
    assert by_name["pass@1 fused"]["y"] == [0.5, 0.4]
    assert by_name["p of losing"]["y"] == [0.01, None], "no place for 0 on a logarithmic axis"
    assert by_name["change"]["text"] == ["LOSING", "LOSING"]
    pays = who_pays([run])
    assert [trace["y"] for trace in pays.data][-2:] == [[-0.1, pytest.approx(-0.2)], [0.0, 0.2]]
    assert panels(figure)[-2:] == ["Floor under the prompt weights", "lambda of hold"]


def test_the_downloads_hold_the_numbers_and_no_formula(folder):
    addresses = [link for link in Page(report(folder).html).links if link.startswith("data:")]
    table, whole = (base64.b64decode(address.split(",")[1]).decode() for address in addresses)
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [float(row["pass_at_1"]) for row in rows if row["pass_at_1"]] == read_run(folder, "pass_at_1")
    assert not any(cell.startswith(("=", "+", "@")) for row in rows for cell in row.values())
    assert len(json.loads(whole)["events"]) == len(rows)


def read_run(folder, name):
    return [value for value in Run("r", read_journal(folder)).column(name) if value is not None]
