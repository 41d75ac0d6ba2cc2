"""Each mistake has its own message, says what to pass instead, and leaves the output folder alone."""

import json
import sys

import pytest

from passk_guard import GuardError
from passk_guard.analysis import Settings
from passk_guard.analysis.load import import_function, load_model
from tests.analysis.cases import PromptSampler, command, quick, save_model, write_probe
from tests.helpers.tiny import probe_rows, tiny_model


def needs_solution(completions, solution):
    return [1.0 for _ in completions]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--k", "1,16"), "num_samples=8, k=16"),
        (("--k", "0,2"), "`ks.0`: Input should be greater than or equal to 1; found 0"),
        (("--prompts", "99"), "at most 13"),
        (("--gamma", "1"), "`gamma`: Input should be less than 1; found 1.0"),
        (("--temperature", "0"), "`temperature`: Input should be greater than 0; found 0.0"),
        (("--max-new-tokens", "64"), "do not fit"),
        (("--correct", "tests.helpers.tiny:no_such"), "Expected a function 'no_such' in 'tests.helpers.tiny'"),
        (("--correct", "no.such.module:f"), "No module named 'no'"),
        (("--correct", "tests/helpers/tiny.py"), "as module:function"),
        (("--correct", "tests.helpers.tiny:SPECIAL"), "found list"),
        (("--correct", "tests.analysis.test_bad_inputs:needs_solution"), "column `solution`"),
    ],
)
def test_arguments(more, words, model, tmp_path, capsys):
    assert command(model, write_probe(tmp_path / "probe.jsonl"), tmp_path / "out", *more) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "at least 3 different prompts"),
        ('{"prompt": "a"}\n{"prompt": "b"\n', "malformed JSON in probe.jsonl, line 2"),
        ('{"prompt": "a"}\n\n[1]\n', "found list in probe.jsonl, line 3"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c\\ud83d"}\n', "half of a surrogate pair in 'c"),
        ('{"prompt": "a"}\n{"question": "b"}\n', "found only ['question'] in probe.jsonl, line 2"),
    ],
)
def test_probes(text, words, model, tmp_path, capsys):
    probe = tmp_path / "probe.jsonl"
    probe.write_text(text)
    assert command(model, probe, tmp_path / "out") == 1
    assert words in capsys.readouterr().err


def test_directories_without_a_model(model, tmp_path):
    empty = tmp_path / "empty"
    with pytest.raises(GuardError, match="found nothing at"):
        load_model(empty)
    empty.mkdir()
    with pytest.raises(GuardError, match=r"with a config\.json; found nothing in"):
        load_model(empty)
    (empty / "config.json").write_text((model / "config.json").read_text())
    with pytest.raises(GuardError, match=r"Expected weights .*; found config\.json"):
        load_model(empty)
    (empty / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(GuardError, match="transformers can load"):
        load_model(empty)
    with pytest.raises(GuardError, match="found a file at"):
        load_model(empty / "config.json")
    with pytest.raises(GuardError, match="`base` with an adapter only"):
        load_model(model, base=model)


@pytest.mark.parametrize("which", ["folder", "file", "no_config"])
def test_a_gguf_file_is_to_be_converted(which, tmp_path):
    place = tmp_path / "tiny.Q4_1.gguf"
    place.write_bytes(b"GGUF")
    if which != "no_config":
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(GuardError, match=r"found tiny\.Q4_1\.gguf in .*: convert it.*gguf_file='tiny\.Q4_1\.gguf'"):
        load_model(place if which == "file" else tmp_path)
    with pytest.raises(GuardError, match="found nothing at"):
        load_model(tmp_path / "other.gguf")


def test_weights_beside_a_gguf_file_are_taken(tmp_path):
    folder = save_model(tmp_path / "model")
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert load_model(folder).num_parameters()


def test_a_model_without_a_tokenizer(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    assert command(tmp_path / "model", write_probe(tmp_path / "probe.jsonl"), tmp_path / "out") == 1
    assert "Expected a tokenizer" in capsys.readouterr().err


def test_functions_come_from_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_7.py").write_text("def right(completions, **_):\n    return [1.0] * len(completions)\n")
    (tmp_path / "broken_7.py").write_text("raise OSError('no sandbox')\n")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    assert import_function("my_rewards_7:right")(["a"]) == [1.0]
    with pytest.raises(GuardError, match="OSError: no sandbox"):
        import_function("broken_7:right")
    with pytest.raises(GuardError, match="Functions there: right"):
        import_function("my_rewards_7:wrong")


def test_a_verifier_that_always_raises_says_so():
    def broken(completions, **_):
        raise ConnectionError("no sandbox")

    from passk_guard.analysis import analyze
    from tests.analysis.cases import QUICK
    from tests.helpers.tiny import tiny_tokenizer

    with pytest.raises(GuardError, match="`broken` raised on each of 40 samples, first ConnectionError: no sandbox"):
        analyze(tiny_model(), tiny_tokenizer(), probe_rows(5), broken, sampler=PromptSampler(), **QUICK)


OUTSIDE = {"confidence": 0.4, "threshold": 1.0, "gamma": 1.0, "sketch_method": "x", "prompts": 2, "seed": 2**53}
OTHER_KIND = {"num_samples": 8.0, "max_tokens": True, "temperature": "1", "ks": 4, "last_layer": 1, "seed": None}


def test_settings_check_themselves():
    with pytest.raises(TypeError, match="tempreture"):
        quick(tempreture=1.0)
    for name, wrong in OUTSIDE.items():
        with pytest.raises(GuardError, match=f"`{name}`: Input should be .*; found {wrong!r}"):
            Settings(**{name: wrong})
    for name, wrong in OTHER_KIND.items():
        with pytest.raises(GuardError, match=f"`{name}`: Input should be a valid .*; found {wrong!r}"):
            Settings(**{name: wrong})
    assert Settings(ks=[8, 2, 2]).ks == Settings(ks=(2, 8)).ks == (1, 2, 8)
    assert Settings(ks=range(1, 4)).ks == (1, 2, 3)
    json.dumps(Settings().to_dict(), allow_nan=False)
