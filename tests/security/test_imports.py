"""Only the function that the user names with `--correct` is imported. Files that are read name no module."""

import json
import sys
from contextlib import suppress

import pytest
import torch

from passk_guard import GuardError
from passk_guard.analysis import Analysis
from passk_guard.analysis.load import import_function, load_model, load_tokenizer
from passk_guard.analysis.results import to_json
from passk_guard.callback.state import FILE_NAME, load_memory
from passk_guard.cli import main
from passk_guard.probe.prompts import ProbeSet
from passk_guard.reporting import Journal
from tests.analysis.cases import save_model, synthetic

NAME = "evil_module_7"
FUNCTION = f"{NAME}:right"
MODULE = "open({!r}, 'w').close()\ndef right(completions, **_):\n    return [1.0] * len(completions)\n"


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Whether a module in the current directory was imported, which leaves a mark."""
    mark = tmp_path / "mark"
    (tmp_path / f"{NAME}.py").write_text(MODULE.format(str(mark)))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.chdir(tmp_path)
    sys.modules.pop(NAME, None)
    yield lambda: mark.exists() or NAME in sys.modules
    sys.modules.pop(NAME, None)


def test_the_function_that_the_user_names(imported):
    assert not imported()
    assert import_function(FUNCTION)(["a"]) == [1.0]
    assert imported()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", f"correct: {FUNCTION}\n"),
        ("b.yaml", f"k: !!python/name:{NAME}.right\n"),
        ("c.yaml", f"k: !!python/object/apply:{NAME}.right [[]]\n"),
        ("d.yaml", f"!!python/module:{NAME} {{}}\n"),
        ("e.json", json.dumps({"source": FUNCTION, "__reduce__": FUNCTION})),
    ],
)
def test_settings(name, text, imported, tmp_path):
    (tmp_path / name).write_text(text)
    assert main(["check", name]) == 1
    assert not imported()


def test_a_journal_a_probe_and_an_analysis(imported, tmp_path):
    journal = Journal(tmp_path / "run" / "passk_guard.jsonl")
    journal.write("start", 0, settings={"correct": FUNCTION, "verifier": FUNCTION})
    journal.write("refresh", 0, verdict=FUNCTION, reason=FUNCTION)
    assert main(["report", "run"]) == 0
    rows = [{"prompt": f"p{i}", "correct": FUNCTION, "reward": FUNCTION} for i in range(4)]
    (tmp_path / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(ProbeSet.of(tmp_path / "probe.jsonl")) == 4
    data = json.loads(to_json(synthetic(5).to_dict())) | {"verifier": FUNCTION}
    assert Analysis.from_dict(data).verifier == FUNCTION
    assert not imported()


def test_a_checkpoint(imported, tmp_path):
    module = __import__(NAME)
    torch.save({"format": 1, "decision": module.right}, tmp_path / FILE_NAME)
    del sys.modules[NAME]
    (tmp_path / "mark").unlink()
    assert load_memory(tmp_path) is None
    assert not imported()


@pytest.mark.parametrize(
    "more", [{"megatron_config": {"a": 1}, "megatron_core": NAME}, {"auto_mapping": {"parent_library": NAME}}]
)
def test_an_adapter(more, imported, tmp_path):
    base, adapter = save_model(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config | more))
    with pytest.raises(GuardError, match=r"adapter"):
        load_model(adapter)
    assert not imported()


def test_a_model_and_a_tokenizer(imported, tmp_path):
    base = save_model(tmp_path / "base")
    (base / f"{NAME}.py").write_text((tmp_path / f"{NAME}.py").read_text())
    autos = {
        "config.json": {"AutoModelForCausalLM": f"{NAME}.Right", "AutoConfig": f"{NAME}.Right"},
        "tokenizer_config.json": {"AutoTokenizer": [f"{NAME}.Right", None]},
    }
    for file, auto in autos.items():
        config = json.loads((base / file).read_text())
        (base / file).write_text(json.dumps(config | {"auto_map": auto, "model_type": "unknown_7"}))
    for load in (load_model, load_tokenizer):
        with suppress(GuardError):  # refused, or loaded by transformers' own classes
            load(base)
    assert not imported()
