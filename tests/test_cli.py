"""`passk-guard` as a user meets it: what it prints, what it writes, how it ends."""

import inspect
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from passk_guard import GuardConfig
from passk_guard.analysis import Settings
from passk_guard.cli import analyze, app, main, plan
from passk_guard.config import config_problems, config_schema
from passk_guard.planning.plan import PROMPTS
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


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["check"], ["report"]])
def test_wrong_usage_leaves_with_2(arguments, capsys):
    assert main(arguments) == 2
    assert "Usage: passk-guard" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["analyze", "m", "--probe", "p", "--correct", "c", "--out", "o", "--k", "1,two"], "found '1,two'"),
        (["analyze", "m", "--probe", "p", "--correct", "c", "--out", "o", "--sketch-method", "x"], "kronecker"),
        (["analyze", "m", "--probe", "p", "--out", "o"], "--correct"),
        (["plan", "run", "--prompts", "32,x"], "whole numbers"),
        (["plan", "run", "--power", "much"], "--power"),
    ],
)
def test_wrong_values_leave_with_2_and_name_the_option(arguments, words, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err


def test_version_and_help(run):
    for arguments, words in (
        (["--version"], "passk-guard "),
        (["--help"], "analyze"),
        (["plan", "--help"], "--prompts"),
    ):
        status, out, err = run(*arguments)
        assert (status, err) == (0, "")
        assert words in out


HELP = """
import resource, sys
from passk_guard.cli import main
status = main(["--help"])
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = {"torch", "transformers", "pydantic"} & set(sys.modules)
print(status, used.ru_utime + used.ru_stime, *sorted(heavy))
"""


def test_help_is_quick_and_imports_nothing_heavy():
    """About 0.2 s of processor time; the bound leaves room for a busy machine."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=120, check=True)
    status, seconds, *heavy = done.stdout.splitlines()[-1].split()
    assert (status, heavy) == ("0", [])
    assert float(seconds) < 1.0


def test_the_defaults_of_analyze_are_those_of_its_settings():
    options = inspect.signature(analyze).parameters
    defaults = Settings().to_dict() | {"ks": ",".join(map(str, Settings().ks))}
    assert {name: options[name].default for name in defaults} == defaults
    own = {"model", "probe", "correct", "out", "force", "adapter", "base", "progress", "as_json"}
    own |= {"context", "rollouts", "columns"}
    assert set(options) == own | set(defaults), "what is no setting is left out of the settings by name"


def test_answers_as_json(run, tmp_path):
    folder = write_run(tmp_path / "run")
    page = folder / "passk_guard.html"
    found = json.loads(run("report", folder, "--json")[1])
    assert found == {"page": str(page), "journals": [str(folder / "passk_guard.jsonl")]}
    for text, problems in (("k: 4", []), ("zzz: 1", ["zzz: unknown setting"])):
        (tmp_path / "a.yaml").write_text(text)
        status, out, err = run("check", tmp_path / "a.yaml", "--json")
        assert (status, err) == (len(problems), "")
        assert json.loads(out) == {"config": str(tmp_path / "a.yaml"), "valid": not problems, "problems": problems}


def test_every_command_that_prints_a_result_can_print_json(capsys):
    commands = [command.callback.__wrapped__ for command in app.registered_commands]
    without = {c.__name__ for c in commands if "as_json" not in inspect.signature(c).parameters}
    assert without == {"schema"}, "it prints JSON in any case"


def test_the_demo_takes_its_options_and_says_what_it_lacks(run, monkeypatch):
    asked = []
    monkeypatch.setattr("passk_guard.cli._demo", lambda: lambda *given: asked.append(given) or 1)
    assert run("demo", "--out", "a", "--seeds", "0,1", "--json")[0] == 1
    assert asked == [(["--out", "a", "--cache", "runs/warm_start", "--seeds", "0", "1", "--json"], "passk-guard demo")]

    def missing():
        raise ModuleNotFoundError("No module named 'trl'", name="trl")

    monkeypatch.setattr("passk_guard.cli._demo", missing)
    status, out, err = run("demo")
    assert (status, out) == (1, "")
    assert "pip install 'passk-guard[demo]'" in err


def test_the_default_sizes_of_plan():
    assert inspect.signature(plan).parameters["prompts"].default == ",".join(map(str, PROMPTS))


def test_sizes_of_a_plan_may_stand_apart(monkeypatch, run):
    found = []
    monkeypatch.setattr("passk_guard.planning.inputs.read_past", lambda *_: SimpleNamespace(noise=0, config=0, cost=0))
    monkeypatch.setattr("passk_guard.planning.plan.make_plan", lambda *_, prompts, **__: found.append(prompts))
    for sizes in (["32", "64"], ["32,64"]):
        with pytest.raises(AttributeError):
            run("plan", "run", "--prompts", *sizes, "--json")
    assert found == [(32, 64), (32, 64)]


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
from passk_guard.reporting import run_report
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
