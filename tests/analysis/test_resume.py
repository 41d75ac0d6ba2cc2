"""Interrupted and started again: the same result, and nothing sampled twice."""

import json
import shutil

import pytest

from passk_guard import GuardError
from passk_guard.probe.samplers import GenerateSampler
from tests.analysis.cases import PromptSampler, command, quick, save_model, write_probe
from tests.helpers.tiny import probe_rows, tiny_model

ROWS = probe_rows(13)


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    whole = PromptSampler()
    expected = quick(sampler=whole)
    stopped = PromptSampler(stop_after=6)
    with pytest.raises(KeyboardInterrupt):
        quick(sampler=stopped, out=tmp_path)
    assert 0 < len(stopped.sampled) < 13
    again = PromptSampler()
    assert quick(sampler=again, out=tmp_path) == expected
    assert sorted(stopped.sampled + again.sampled) == sorted(row["prompt"] for row in ROWS)
    third = PromptSampler()
    assert quick(sampler=third, out=tmp_path) == expected
    assert third.sampled == []


def test_with_generate_and_ctrl_c_at_the_command_line(tmp_path, monkeypatch, capsys):
    model, probe = save_model(tmp_path / "model"), write_probe(tmp_path / "probe.jsonl")
    arguments = ("--batch-size", "16", "--progress")
    assert command(model, probe, tmp_path / "whole", *arguments) == 0
    sample, calls = GenerateSampler.sample, []

    def interrupted(self, rows, num_samples, seed):
        calls.append(seed)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sample(self, rows, num_samples, seed)

    monkeypatch.setattr(GenerateSampler, "sample", interrupted)
    assert command(model, probe, tmp_path / "out", *arguments) == 130
    assert "same command goes on" in capsys.readouterr().err
    kept = (tmp_path / "out" / "rollouts" / "rank0.jsonl").read_text()
    assert len(kept.splitlines()) == 6
    assert command(model, probe, tmp_path / "out", *arguments) == 0
    assert len(calls) == 4 + 4  # seven chunks of two prompts, three of them kept
    whole, again = ((tmp_path / d / "analysis.json").read_text() for d in ("whole", "out"))
    assert whole == again


def test_a_line_cut_short_is_sampled_again_and_written_whole(tmp_path):
    expected = quick(out=tmp_path)
    file = tmp_path / "rollouts" / "rank0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    again = PromptSampler()
    assert quick(sampler=again, out=tmp_path) == expected
    assert again.sampled == [ROWS[-1]["prompt"]]
    assert [json.loads(line)["place"] for line in file.read_text().splitlines()] == list(range(13))


def test_completions_of_other_ranks_are_used(tmp_path):
    """What two processes sampled serves one, whatever file it is in."""
    expected = quick(out=tmp_path)
    own, other = tmp_path / "rollouts" / "rank0.jsonl", tmp_path / "rollouts" / "rank1.jsonl"
    lines = own.read_text().splitlines(keepends=True)
    own.write_text("".join(lines[::2]))
    other.write_text("".join(lines[1::2]))
    again = PromptSampler()
    assert quick(sampler=again, out=tmp_path) == expected
    assert again.sampled == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed 0 and not 1"),
        ({"num_samples": 9}, "num_samples 8 and not 9"),
        ({"rows": probe_rows(12)}, "other prompts"),
        ({"model": tiny_model(seed=1)}, "another model"),
        ({"temperature": 0.5}, "temperature 1.0 and not 0.5"),
    ],
)
def test_samples_of_something_else_are_refused_by_name_unless_forced(change, words, tmp_path):
    quick(out=tmp_path)
    with pytest.raises(GuardError, match=words):
        quick(out=tmp_path, **change)
    again = PromptSampler()
    quick(out=tmp_path, sampler=again, force=True, **change)
    assert len(again.sampled) == len(change.get("rows", ROWS))


def test_what_samples_do_not_depend_on_may_change(tmp_path):
    quick(out=tmp_path)
    again = PromptSampler()
    analysis = quick(out=tmp_path, sampler=again, ks=(1, 8), last_layer=True, sketch_dim=256)
    assert again.sampled == []
    assert analysis.settings["ks"] == [1, 8]


def test_one_changed_weight_is_another_model(tmp_path):
    quick(out=tmp_path)
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] += 1e-6
    with pytest.raises(GuardError, match="another model"):
        quick(model, out=tmp_path)


def test_a_damaged_line_is_named(tmp_path):
    quick(out=tmp_path)
    file = tmp_path / "rollouts" / "rank0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    lines[2] = '{"place": 2, "promp\n'
    file.write_text("".join(lines))
    with pytest.raises(GuardError, match=r"damaged line 3 in .*rank0\.jsonl"):
        quick(out=tmp_path)


def test_samples_without_their_settings_are_refused(tmp_path):
    quick(out=tmp_path)
    (tmp_path / "rollouts" / "settings.json").unlink()
    with pytest.raises(GuardError, match=r"settings\.json, which names what they are of, is missing"):
        quick(out=tmp_path)


def test_a_finished_analysis_is_not_overwritten_by_another(tmp_path):
    quick(out=tmp_path).save(tmp_path)
    before = (tmp_path / "analysis.json").read_text()
    quick(out=tmp_path).save(tmp_path)
    with pytest.raises(GuardError, match=r"differs in ks"):
        quick(out=tmp_path, ks=(1, 2))
    with pytest.raises(GuardError, match=r"differs in the model"):
        quick(tiny_model(seed=1)).save(tmp_path)
    assert (tmp_path / "analysis.json").read_text() == before
    quick(out=tmp_path, ks=(1, 2), force=True).save(tmp_path, force=True)
    assert json.loads((tmp_path / "analysis.json").read_text())["settings"]["ks"] == [1, 2]


@pytest.mark.parametrize("name", ["notes.txt", "analysis.html"])
def test_the_users_files_are_left_alone(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(GuardError, match=name):
        quick(out=tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert not (tmp_path / "rollouts").exists()
    quick(out=tmp_path, force=True)
    assert (tmp_path / name).read_text() == "mine"
    shutil.rmtree(tmp_path)
    tmp_path.write_text("a file")
    with pytest.raises(GuardError, match="found a file"):
        quick(out=tmp_path, force=True)
