"""What the sources must never do, by a walk over them: run what was read, unpickle, or reach for a network."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "passk_guard").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])
RUNS_TEXT = {"eval", "exec", "compile", "__import__", "execfile"}
UNPICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
TEMPLATES = {"jinja2", "string.Template"}
NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "xmlrpc"}
PROCESSES = {"subprocess", "pty", "webbrowser"}
LOGGERS = {f"logger.{level}" for level in ("debug", "info", "warning", "error", "exception", "critical")}
IMPORT_BY_NAME = {"passk_guard/__init__.py", "passk_guard/analysis/load.py"}
"""The first imports from a fixed table, the second what the user typed after `--correct`."""


def relative(path):
    return str(path.relative_to(ROOT))


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node):
    return ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""


def found_in(text):
    """What a file of this text must not do, in words."""
    tree, found = ast.parse(text), []
    names = set(imported(tree))
    roots = {name.split(".")[0] for name in names}
    found += [f"imports {name}" for name in sorted(roots & (UNPICKLES | NETWORK | PROCESSES) | names & TEMPLATES)]
    found += ["imports jinja2"] if "jinja2" in roots else []
    for call in calls(tree):
        name = dotted(call.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in RUNS_TEXT or name in ("os.system", "os.popen") or name.startswith("os.exec"):
            found.append(f"calls {name}")
        if name in ("torch.load", "load") and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name.startswith("yaml.") and name not in ("yaml.safe_load", "yaml.safe_dump"):
            found.append(f"calls {name}")
        if name.endswith((".read_pickle", ".allow_pickle")) or keywords.get("allow_pickle") == "True":
            found.append(f"{name} unpickles")
        if name.endswith("import_module"):
            found.append("imports a module by name")
        if keywords.get("trust_remote_code", "False") != "False" or keywords.get("shell", "False") != "False":
            found.append(f"{name} runs code of others")
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("format", "format_map"):
            template = call.func.value
            if not (isinstance(template, ast.Constant) and isinstance(template.value, str)):
                found.append("a text that is not its own is a format")
        if name in LOGGERS and call.args and not isinstance(call.args[0], ast.Constant):
            found.append("a log line whose format is not its own")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_is_run_unpickled_or_fetched(path):
    found = found_in(path.read_text())
    if relative(path) in IMPORT_BY_NAME:
        assert found == ["imports a module by name"]
    else:
        assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "exec(text)",
        "import pickle",
        "from urllib.request import urlopen",
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import yaml; yaml.load(text)",
        "import yaml; yaml.unsafe_load(text)",
        "import numpy; numpy.load(path, allow_pickle=True)",
        "import importlib; importlib.import_module(name)",
        "model.from_pretrained(path, trust_remote_code=True)",
        "prompt.format(x)",
        "logger.warning(prompt)",
        "logger.warning(f'{prompt}')",
        "import subprocess",
        "import os; os.system(text)",
        "import jinja2",
        "from string import Template",
    ],
)
def test_the_walk_sees(line):
    assert found_in(line), line
