"""What surrounds the package: metadata, workflows, templates and hooks name what exists."""

import re
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import passk_guard

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))


def commands(workflow):
    """The shell lines of all its jobs, with the values of the matrix put in."""
    for job in WORKFLOWS[workflow]["jobs"].values():
        rows = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
        for row in rows:
            for step in job["steps"]:
                yield re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda m, row=row: str(row[m[1]]), step.get("run", ""))


def made(lines):
    words = (word for line in lines for found in re.findall(r"\bmake (.+)", line) for word in found.split())
    return {word for word in words if "=" not in word and not word.startswith("-")}


@pytest.mark.parametrize("name", ["ci", "nightly", "release"])
def test_workflows_call_make_targets_that_exist(name):
    workflow = WORKFLOWS[name]
    assert {"name", True, "jobs", "permissions"} <= set(workflow), "YAML reads the key `on` as true"
    found = made(commands(name))
    assert found
    assert found <= TARGETS
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w.-]+@[\w./-]+", step["uses"])


def test_the_workflow_has_all_that_ci_runs():
    stages = re.findall(r"^stage (.+)$", (ROOT / ".ci/run").read_text(), flags=re.M)
    asked = {word for line in stages for word in line.split() if not word.startswith("-") and word != "2"}
    assert asked <= made(commands("ci"))


def test_every_python_that_is_promised_is_tested_and_none_else():
    promised = set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT))
    rows = WORKFLOWS["ci"]["jobs"]["make"]["strategy"]["matrix"]["include"]
    assert {row["python"] for row in rows if "python" in row} == promised
    assert min(promised, key=lambda v: int(v[2:])) == re.search(r'requires-python = ">=([\d.]+)"', PYPROJECT)[1]


def test_only_the_job_that_publishes_may_ask_for_a_token():
    jobs = WORKFLOWS["release"]["jobs"]
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in WORKFLOWS.values())
    assert jobs["publish"]["needs"] == "build", "what is published has been tested"


def test_the_version_is_said_in_one_place_and_cited_right():
    version = re.search(r'^version = "(.+)"', PYPROJECT, flags=re.M)[1]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert passk_guard.__version__ == metadata.version("passk-guard")


def test_addresses_agree():
    urls = re.search(r"\[project\.urls\]\n(.*?)\n\n", PYPROJECT, flags=re.S)[1]
    home = re.search(r'Homepage = "(.+)"', urls)[1]
    others = [*re.findall(r'= "(.+)"', urls), yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"]]
    others += re.findall(r"url: (\S+)", (ROOT / ".github/ISSUE_TEMPLATE/config.yml").read_text())
    assert all(url.startswith(home) for url in others)


def test_templates_and_hooks_are_well_formed():
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert path.stem == "config" or {"name", "description", "body"} <= set(form)
        assert all(part["type"] in ("textarea", "dropdown") for part in form.get("body", []))
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    lint = re.search(r"^lint:.*?\n\n", (ROOT / "Makefile").read_text(), flags=re.M | re.S)[0]
    for hook in repo["hooks"]:
        tool = hook["entry"].removeprefix(".venv/bin/").split(" --")[0]
        assert f"$(BIN)/{tool}" in lint, "the hooks are what `make lint` runs"


def test_the_wheel_has_every_module_that_the_demo_imports():
    places = dict(
        re.findall(r'^"examples/interference/(\w+)\.py" = "passk_guard/_demo/(\w+)\.py"', PYPROJECT, flags=re.M)
    )
    assert all(name == place for name, place in places.items())
    for name in places:
        code = (ROOT / "examples/interference" / f"{name}.py").read_text()
        assert "examples.interference" not in re.sub(r'"""(.*?)"""', "", code, flags=re.S), "relative names alone"
        assert set(re.findall(r"^from \.(\w+) import", code, flags=re.M)) <= set(places)
        assert set(re.findall(r"^from \. import (\w+)", code, flags=re.M)) <= set(places)
