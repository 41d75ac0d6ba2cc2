"""`screen`: which prompts are kept, against a loop over the samples of `analyze`, and what is said of the others."""

import json

import pytest

from passk_guard import GuardError
from passk_guard.analysis import analyze
from passk_guard.analysis.screen import Screened, screen
from passk_guard.cli import main
from tests.analysis.cases import save_model, write_probe
from tests.helpers.tiny import digit_reward, probe_rows, tiny_model, tiny_tokenizer

SMALL = {"num_samples": 2, "max_new_tokens": 2, "batch_size": 16}


def test_kept_are_those_with_right_and_wrong_samples(tmp_path):
    model = tiny_model("llama", seed=1)
    rows = [{**row, "place": i, "note": "é"} for i, row in enumerate(probe_rows(24))]
    found = screen(model, tiny_tokenizer(), rows, digit_reward, **SMALL)
    analyze(model, tiny_tokenizer(), rows, digit_reward, out=tmp_path, ks=(1, 2), sketch_dim=256, **SMALL)
    lines = [json.loads(line) for line in (tmp_path / "rollouts" / "rank0.jsonl").read_text().splitlines()]
    right = {line["place"]: sum(digit_reward(line["completions"])) for line in lines}
    assert {0, 2} < set(right.values()), "the case has prompts of every kind"
    assert [row["place"] for row in found.rows] == [place for place in range(24) if right[place] == 1]
    assert (found.never, found.always, found.unscored) == (
        *(list(right.values()).count(count) for count in (0, 2)),
        0,
    )
    found.save(tmp_path / "new" / "kept.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "new" / "kept.jsonl").read_text().splitlines()]
    assert kept == [rows[row["place"]] for row in found.rows]


def test_samples_without_a_verdict_are_neither_right_nor_wrong():
    def odd(completions, prompts, **_):
        return [None if prompt[0] == "1" else float(i % 2) for i, prompt in enumerate(prompts)]

    found = screen(tiny_model(), tiny_tokenizer(), probe_rows(24), odd, **SMALL)
    assert (len(found.rows), found.never, found.always, found.unscored) == (14, 0, 0, 10)
    assert "10 without a verdict" in found.text


def test_the_command(tmp_path, capsys):
    model, pool, out = save_model(tmp_path / "model"), write_probe(tmp_path / "pool.jsonl"), tmp_path / "kept.jsonl"
    command = ["screen", str(model), "--prompts", str(pool), "--out", str(out), "--samples", "4"]
    command += ["--max-new-tokens", "2", "--correct", "tests.helpers.tiny:digit_reward"]
    assert main(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    kept = out.read_text().splitlines()
    assert 3 <= len(kept) < 13
    assert f"Kept {len(kept)} of 13 prompts" in said
    assert (
        f"speak for prompts like these and not for all 13: their pass rates are not those of the pool. Written: {out}"
        in said
    )
    assert main(command) == 1
    assert "found a file at" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert out.read_text().splitlines() == kept


def test_refusals(tmp_path):
    def right(completions, **_):
        return [1.0] * len(completions)

    with pytest.raises(GuardError, match=r"found 0, 0 never solved and 5 always solved in 2 samples each"):
        screen(tiny_model(), tiny_tokenizer(), probe_rows(5), right, **SMALL)
    with pytest.raises(GuardError, match="JSON can hold"):
        Screened(({"prompt": "a", "n": float("nan")},), 0, 0, 0, 4).save(tmp_path / "kept.jsonl")
    with pytest.raises(GuardError, match="found a folder"):
        Screened((), 0, 0, 0, 4).save(tmp_path, force=True)
