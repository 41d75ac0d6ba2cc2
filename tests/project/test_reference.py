"""docs/reference: tables of settings, metrics and commands, as the package has them.

python -m tests.project.test_reference    # writes them anew
"""

import inspect
import re
from pathlib import Path

import pytest
import typer

import passk_guard
from passk_guard.cli import app
from passk_guard.config import config_schema
from tests.helpers.tiny import digit_reward, probe_rows, tiny_grpo_trainer

DOCS = Path(__file__).parents[2] / "docs"
BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
LARGEST = 2**31 - 1  # of every whole number, and no news


def cell(text):
    """One cell: plain text, in which neither a bar nor `<g, p>` is markup."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def table(head, rows):
    lines = ["| " + " | ".join(map(cell, line)) + " |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def values(field):
    """`one of "a", "b"` or `integer, ≥ 1` of a field of the JSON schema."""
    if "anyOf" in field:
        return " or ".join("None" if one.get("type") == "null" else values(one) for one in field["anyOf"])
    if "enum" in field:
        return "one of " + ", ".join(f'"{value}"' for value in field["enum"])
    bounds = [words.format(f"{field[name]:g}") for name, words in BOUNDS.items() if field.get(name, LARGEST) != LARGEST]
    return ", ".join([field.get("type", "mapping"), *bounds])


def settings(part):
    def default(field):
        found = field.get("default")
        return "see below" if isinstance(found, dict) else f'"{found}"' if isinstance(found, str) else found

    rows = [(f"`{name}`", values(f), default(f), f["description"]) for name, f in part["properties"].items()]
    return table(["setting", "values", "default", "meaning"], rows)


def metrics():
    lines = inspect.cleandoc(passk_guard.watch.__doc__).splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def arguments(found):
    return [one for one in found.params if one.param_type_name == "argument"]


def command(name, found):
    usage = " ".join(one.metavar if one.required else f"[{one.metavar}]" for one in arguments(found))
    rows = [(f"`{one.metavar}`", "", one.help) for one in arguments(found)]
    for one in found.params:
        if one.param_type_name == "option" and one.name != "help":
            names = " ".join(f"`{spelling}`" for spelling in (*one.opts, *one.secondary_opts))
            plain = one.required or callable(one.default) or one.default is None or one.default is False
            rows.append((names, "required" if one.required else "" if plain else one.default, one.help))
    parts = [f"## {name}", f"`passk-guard {name} {usage}`".replace(" `", "`"), inspect.cleandoc(found.help)]
    return "\n\n".join(parts + ([table(["argument or option", "default", "meaning"], rows)] if rows else []))


def pages():
    """Each page with its parts made anew: what stands by hand before, and between, is kept."""
    schema = config_schema()
    kept = {name: (DOCS / "reference" / f"{name}.md").read_text() for name in ("settings", "metrics", "cli")}
    filled = {
        "settings": {"## GuardConfig\n": settings(schema), "turn: .*?\n": settings(schema["$defs"]["Advanced"])},
        "metrics": {"## Every run\n": metrics()},
        "cli": {},
    }
    for name, parts in filled.items():
        for after, content in parts.items():
            pattern = rf"({after})\n*(?:\|.*\n)*\n*"
            kept[name], count = re.subn(pattern, lambda m, c=content: f"{m[1]}\n{c}\n\n", kept[name])
            assert count == 1, (name, after)
        kept[name] = kept[name].rstrip() + "\n"
    commands = typer.main.get_command(app).commands
    kept["cli"] = "\n\n".join(
        [kept["cli"].partition("\n\n## ")[0].rstrip(), *map(command, commands, commands.values())]
    )
    kept["cli"] += "\n"
    return kept


@pytest.mark.parametrize("name", ["settings", "metrics", "cli"])
def test_the_page_is_what_the_package_has(name):
    if name == "cli" and not arguments(typer.main.get_command(app).commands["report"])[0].help:
        pytest.skip("this version of typer keeps no help of arguments")
    again = "python -m tests.project.test_reference writes it anew"
    assert (DOCS / "reference" / f"{name}.md").read_text() == pages()[name], again


def test_the_metrics_of_a_run_are_documented(tmp_path):
    """And those of the mitigations."""
    page = (DOCS / "reference" / "metrics.md").read_text()
    names = {found for row in re.findall(r"^\| (`.+?) \|", page, flags=re.M) for found in re.findall(r"`(.+?)`", row)}
    suffixes = {name for name in names if name.startswith("_")}
    names |= {name + suffix for name in names for suffix in suffixes}
    trainer = tiny_grpo_trainer(tmp_path, max_steps=3)
    small = {"probe_prompts": 10, "num_samples": 8, "sketch_dim": 512, "refresh_steps": 1}
    passk_guard.watch(trainer, probe_rows(), digit_reward, k=4, **small)
    trainer.train()
    found = {name for row in trainer.state.log_history for name in row if name.startswith("passk_guard/")}
    assert "passk_guard/pass_at_4_total_ci_low" in found
    assert {name.removeprefix("passk_guard/").replace("_at_4", "_at_<k>") for name in found} <= names
    source = "".join(path.read_text() for path in (DOCS.parent / "passk_guard" / "mitigation").glob("*_guard.py"))
    logged = set(re.findall(r'^ {12}"(\w+)": ', source, flags=re.M))
    assert {"train_cosine", "weight_ratio"} <= logged <= names


if __name__ == "__main__":
    for name, content in pages().items():
        (DOCS / "reference" / f"{name}.md").write_text(content)
