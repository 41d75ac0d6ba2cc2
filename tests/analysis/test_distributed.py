"""Several processes see what one sees, and fail together."""

import json
import shutil

import pytest

from tests.analysis.cases import command, compare_command, save_model, write_probe
from tests.distributed.launch import launch
from tests.helpers.tiny import probe_rows, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.distributed
WORKER = "tests.analysis.worker"


def close(left, right, path=""):
    """Nested mappings that agree, numbers up to the order of a float32 sum."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            close(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), path
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            close(a, b, f"{path}[{i}]")
    elif isinstance(left, float):
        assert right == pytest.approx(left, rel=1e-3, abs=1e-4), path
    else:
        assert left == right, path


@pytest.mark.parametrize("ranks", [2, 3])
def test_two_processes_give_what_one_gives(ranks, tmp_path):
    """11 prompts in chunks of two do not divide by 2 or 3."""
    save_model(tmp_path / "model")
    write_probe(tmp_path / "probe.jsonl", probe_rows(11))
    arguments = (tmp_path / "model", tmp_path / "probe.jsonl")
    assert command(*arguments, tmp_path / "single", "--last-layer", "--batch-size", "16") == 0
    assert launch("command", tmp_path, ranks, worker=WORKER) == [{"status": 0}] * ranks
    files = sorted((tmp_path / "out" / "rollouts").glob("rank*.jsonl"))
    assert len(files) == ranks
    kept = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted(line["place"] for line in kept) == list(range(11))
    single = (tmp_path / "single" / "rollouts" / "rank0.jsonl").read_text().splitlines()
    assert sorted(map(json.dumps, kept)) == sorted(json.dumps(json.loads(line)) for line in single)
    found, expected = (json.loads((tmp_path / d / "analysis.json").read_text()) for d in ("out", "single"))
    close(expected, found)
    # And one process goes on with what several have sampled.
    shutil.move(tmp_path / "out" / "analysis.json", tmp_path / "found.json")
    assert command(*arguments, tmp_path / "out", "--last-layer", "--batch-size", "16") == 0
    assert sorted((tmp_path / "out" / "rollouts").glob("rank*.jsonl")) == files
    close(expected, json.loads((tmp_path / "out" / "analysis.json").read_text()))


def test_two_processes_compare_as_one_does(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 1)):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    write_probe(tmp_path / "probe.jsonl", probe_rows(11))
    status = compare_command(tmp_path)
    expected = json.loads(capsys.readouterr().out)
    assert any(expected["difference"])
    first, second = launch("compared", tmp_path, 2, worker=WORKER)
    assert first["status"] == second["status"] == status
    close(expected, json.loads(first["out"]))
    assert second["out"] == "", "the first rank speaks for all"


def test_a_verifier_that_fails_on_one_rank_stops_all(tmp_path):
    for found in launch("one_rank_fails", tmp_path, 2, worker=WORKER):
        assert "rank 1: " in found["refused"]
        assert "lost its sandbox" in found["refused"]


def test_what_the_first_rank_refuses_all_refuse(tmp_path):
    first, second = launch("first_rank_refuses", tmp_path, 2, worker=WORKER)
    assert "notes.txt" in first["refused"]
    assert "The first rank refused" in second["refused"]
