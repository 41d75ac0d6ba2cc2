"""A module is imported because the user typed its name after `--correct`, and for no other reason."""

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


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module in the current directory that leaves a mark when it is imported."""
    mark = tmp_path / "mark"
    (tmp_path / f"{NAME}.py").write_text(
        f"open({str(mark)!r}, 'w').close()\ndef right(completions, **_):\n    return [1.0] * len(completions)\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.chdir(tmp_path)
    sys.modules.pop(NAME, None)
    yield lambda: mark.exists() or NAME in sys.modules
    sys.modules.pop(NAME, None)


def test_the_trap_works(trap):
    assert not trap()
    assert import_function(FUNCTION)(["a"]) == [1.0]
    assert trap()


def test_no_settings_import_anything(trap, tmp_path):
    for name, text in (
        ("a.yaml", f"correct: {FUNCTION}\n"),
        ("b.yaml", f"k: !!python/name:{NAME}.right\n"),
        ("c.yaml", f"k: !!python/object/apply:{NAME}.right [[]]\n"),
        ("d.yaml", f"!!python/module:{NAME} {{}}\n"),
        ("e.json", json.dumps({"source": FUNCTION, "__reduce__": FUNCTION})),
    ):
        (tmp_path / name).write_text(text)
        assert main(["check", name]) == 1
    assert not trap()


def test_no_journal_imports_anything(trap, tmp_path):
    journal = Journal(tmp_path / "run" / "passk_guard.jsonl")
    journal.write("start", 0, settings={"correct": FUNCTION, "verifier": FUNCTION})
    journal.write("refresh", 0, verdict=FUNCTION, reason=FUNCTION)
    assert main(["report", "run"]) == 0
    assert not trap()


def test_no_probe_and_no_analysis_imports_anything(trap, tmp_path):
    rows = [{"prompt": f"p{i}", "correct": FUNCTION, "reward": FUNCTION} for i in range(4)]
    (tmp_path / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(ProbeSet.of(tmp_path / "probe.jsonl")) == 4
    data = json.loads(to_json(synthetic(5).to_dict())) | {"verifier": FUNCTION}
    assert Analysis.from_dict(data).verifier == FUNCTION
    assert not trap()


def test_no_checkpoint_imports_anything(trap, tmp_path):
    module = __import__(NAME)
    torch.save({"format": 1, "decision": module.right}, tmp_path / FILE_NAME)
    del sys.modules[NAME]
    (tmp_path / "mark").unlink()
    assert load_memory(tmp_path) is None
    assert not trap()


def test_no_adapter_and_no_model_imports_anything(trap, tmp_path):
    base = save_model(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    for more in ({"megatron_config": {"a": 1}, "megatron_core": NAME}, {"auto_mapping": {"parent_library": NAME}}):
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(base),
            "r": 2,
            "target_modules": ["q_proj"],
            **more,
        }
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(GuardError, match=r"adapter"):
            load_model(adapter)
    for file, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        config = json.loads((base / file).read_text())
        value = [f"{NAME}.Right", None] if key == "AutoTokenizer" else f"{NAME}.Right"
        auto = {key: value} | ({"AutoConfig": f"{NAME}.Right"} if file == "config.json" else {})
        (base / file).write_text(json.dumps(config | {"auto_map": auto, "model_type": "unknown_7"}))
        (base / f"{NAME}.py").write_text((tmp_path / f"{NAME}.py").read_text())
    for load in (load_model, load_tokenizer):
        with suppress(GuardError):  # refused, or loaded by transformers' own classes
            load(base)
    assert not trap()
