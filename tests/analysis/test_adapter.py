"""PEFT adapters: found with their base, and the adapter's parameters alone are theta."""

import json
import shutil

import pytest
import torch

from passk_guard import GuardError
from passk_guard.analysis.load import load_model, load_tokenizer
from tests.analysis.cases import command, save_model, write_probe
from tests.helpers.tiny import tiny_model

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    base = save_model(folder / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model("llama"), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder / "lora")
    return base, folder / "lora", model


def test_an_adapter_finds_its_base(folders):
    base, lora, expected = folders
    ids = torch.arange(6)[None]
    for model in (load_model(lora), load_model(lora, base=base), load_model(base, adapter=lora)):
        assert torch.allclose(model(input_ids=ids).logits, expected.eval()(input_ids=ids).logits, atol=1e-6)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert load_tokenizer(lora).vocab_size == load_tokenizer(base).vocab_size


def test_the_command_on_an_adapter(folders, tmp_path):
    _, lora, model = folders
    probe = write_probe(tmp_path / "probe.jsonl")
    sizes = {name: p.numel() for name, p in model.named_parameters() if "lora_" in name}
    last = sum(size for name, size in sizes.items() if "layers.1." in name)
    for more, size, what in (
        ((), sum(sizes.values()), "all trainable parameters"),
        (("--last-layer",), last, "last hidden layer"),
    ):
        assert command(lora, probe, tmp_path / what, *more) == 0
        sketch = json.loads((tmp_path / what / "analysis.json").read_text())["sketch"]
        assert (sketch["total"], sketch["parameters"]) == (size, what)


def test_another_adapter_is_another_model(folders, tmp_path, capsys):
    base, lora, _ = folders
    probe = write_probe(tmp_path / "probe.jsonl")
    assert command(base, probe, tmp_path / "out") == 0
    assert command(base, probe, tmp_path / "out", "--adapter", str(lora)) == 1
    assert "the model" in capsys.readouterr().err


def test_adapters_that_cannot_be_loaded(folders, tmp_path):
    base, lora, _ = folders
    with pytest.raises(GuardError, match="Expected one adapter"):
        load_model(lora, adapter=lora)
    with pytest.raises(GuardError, match="Expected a PEFT adapter"):
        load_model(base, adapter=base)
    orphan = tmp_path / "orphan"
    shutil.copytree(lora, orphan)
    config = json.loads((orphan / "adapter_config.json").read_text())
    (orphan / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/hub-model"}))
    with pytest.raises(GuardError, match=r"found 'org/hub-model'\. Nothing is downloaded"):
        load_model(orphan)
    (orphan / "adapter_config.json").write_text("{")
    with pytest.raises(GuardError, match="Expected JSON in"):
        load_model(orphan)
    (orphan / "adapter_model.safetensors").unlink()
    with pytest.raises(GuardError, match="Expected a PEFT adapter"):
        load_model(orphan, base=base)
