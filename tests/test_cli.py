"""`passk-guard` as a user meets it: what it prints, what it writes, how it ends."""

import json
import signal
import subprocess
import sys

import pytest

from passk_guard import GuardConfig
from passk_guard.cli import main
from passk_guard.config import config_problems, config_schema
from passk_guard.utils.errors import GuardError
from tests.helpers.journals import write_run


@pytest.fixture
def run(capsys):
    def call(*arguments):
        status = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return call


def test_report_writes_beside_the_journal(run, tmp_path):
    folder = write_run(tmp_path / "run")
    status, out, err = run("report", folder)
    assert (status, out, err) == (0, f"{folder / 'passk_guard.html'}\n", "")
    assert (folder / "passk_guard.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert run("report", folder)[0] == 0, "its own page is replaced"


def test_report_of_two_runs_goes_where_it_is_told(run, tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", guarded=True)
    assert run("report", a, b, "--out", tmp_path / "both.html")[0] == 0
    assert "<title>passk_guard: a and b</title>" in (tmp_path / "both.html").read_text(encoding="utf-8")
    assert not (a / "passk_guard.html").exists()


def test_report_of_a_run_that_goes_on(run, tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "passk_guard.jsonl").open("a") as journal:
        journal.write('{"event": "re')
    status, _, err = run("report", folder)
    assert status == 0
    assert "half written" in err


def test_report_keeps_what_is_not_its_own(run, tmp_path):
    folder = write_run(tmp_path / "run")
    mine = tmp_path / "notes.html"
    mine.write_text("mine")
    status, _, err = run("report", folder, "--out", mine)
    assert status == 1
    assert err.startswith("passk-guard: error: ")
    assert "--force" in err
    assert mine.read_text() == "mine"
    assert run("report", folder, "--out", mine, "--force")[0] == 0
    assert mine.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "found none"), ("", "found none yet"), ('{"event"', "found none yet"), ("x\n{}\n", "line 1: not JSON")],
)
def test_report_without_a_journal(content, words, run, tmp_path):
    if content is not None:
        (tmp_path / "passk_guard.jsonl").write_text(content)
    status, out, err = run("report", tmp_path)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert words in err


def test_names_cannot_speak_to_the_terminal(run, tmp_path):
    status, _, err = run("report", tmp_path / "a\x1b[2Jb")
    assert status == 1
    assert "\x1b" not in err


def test_the_schema_holds_every_setting_with_its_help_and_default(run):
    status, out, _ = run("schema")
    schema = json.loads(out)
    assert status == 0
    assert schema == json.loads(json.dumps(config_schema()))
    fields = GuardConfig.__dataclass_fields__
    assert set(schema["properties"]) == set(fields)
    for name, field in fields.items():
        assert schema["properties"][name]["description"] == field.metadata["help"]
        assert name == "advanced" or schema["properties"][name]["default"] == field.default
    assert schema["additionalProperties"] is False
    assert schema["properties"]["k"]["minimum"] == 2
    assert "project" in schema["properties"]["mitigation"]["enum"]


def check(run, tmp_path, text, name="settings.yaml"):
    path = tmp_path / name
    path.write_text(text)
    status, out, err = run("check", path)
    assert err.count("\n") == err.count("passk-guard: error: "), "one line a problem"
    return status, out, err.replace(f"passk-guard: error: {path}: ", "").splitlines()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("k: 4\ngamma: 0.1\n", "a.yaml"),
        ("passk_guard:\n  k: 4\nlearning_rate: 3\n", "a.yml"),
        ('{\n\t"k": 4, "progress_bar": null\n}', "a.json"),
        ('{"passk_guard": {}}', "a.json"),
    ],
)
def test_check_accepts(text, name, run, tmp_path):
    status, out, lines = check(run, tmp_path, text, name)
    assert (status, lines) == (0, [])
    assert out == f"{tmp_path / name}: valid\n"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("num_sample: 4", ["num_sample: unknown setting; did you mean num_samples?"]),
        ("Gamma: 0.1", ["Gamma: unknown setting; did you mean gamma?"]),
        ("zzz: 1", ["zzz: unknown setting"]),
        ("source: on", ["source: Input should be 'held_out' or 'training_batch'; found True (quote it in YAML)"]),
        ("k: 1", ["k: Input should be greater than or equal to 2; found 1"]),
        ("7: 8", ["7: unknown setting"]),
        ("k: 1\ngamma: much\nrefresh_step: 3", 3),
    ],
)
def test_check_names_every_problem(text, lines, run, tmp_path):
    status, out, found = check(run, tmp_path, text)
    assert (status, out) == (1, "")
    assert len(found) == lines if isinstance(lines, int) else found == lines


def test_check_knows_rules_between_settings(run, tmp_path):
    status, _, lines = check(run, tmp_path, "k: 32")
    assert status == 1
    assert len(lines) == 1
    assert lines[0].startswith("Expected `num_samples` >= k; found num_samples=16, k=32")


@pytest.mark.parametrize(
    "text", ["k: 4", "k: 1", "zzz: 1", "k: 32", "mitigation: project\nsource: training_batch", "- 1"]
)
def test_check_agrees_with_from_yaml(text, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    try:
        GuardConfig.from_yaml(path)
        accepted = True
    except GuardError:
        accepted = False
    try:
        problems = config_problems(path)
    except GuardError as error:
        problems = [str(error)]
    assert accepted == (not problems)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yaml", "a: [", "as YAML"),
        ("a.json", "{", "as JSON"),
        ("a.yaml", "- 1", "a mapping of settings"),
        ("a.yaml", "", "found NoneType"),
        ("a.json", "[" * 100_000, "as JSON"),
        ("a.yaml", None, "No such file"),
    ],
)
def test_check_of_what_is_no_settings_file(name, content, words, run, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    status, out, err = run("check", tmp_path / name)
    assert (status, out) == (1, "")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["check"], ["report"], ["report", "a", "b", "c"]])
def test_wrong_usage_leaves_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage: passk-guard" in capsys.readouterr().err


def test_version_and_help(capsys):
    for arguments, words in ((["--version"], "passk-guard "), (["--help"], "analyze")):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0
        assert words in capsys.readouterr().out


def test_ctrl_c_leaves_with_130(run, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("passk_guard.reporting.run_report.read_journal", interrupted)
    assert run("report", tmp_path) == (130, "", "passk-guard: interrupted\n")


def test_as_a_module_with_a_reader_that_leaves(tmp_path):
    command = [sys.executable, "-m", "passk_guard", "schema"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141
    process.stderr.close()


READS_FOR_EVER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
from passk_guard.cli import main
from passk_guard.reporting.html import run_report
run_report.read_journal = lambda *_: print("reading", flush=True) or time.sleep(60)
sys.exit(main(["report", sys.argv[1]]))
"""


def test_ctrl_c_of_a_real_process(tmp_path):
    command = [sys.executable, "-c", READS_FOR_EVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "passk-guard: interrupted\n"
        assert process.wait(60) == 130
