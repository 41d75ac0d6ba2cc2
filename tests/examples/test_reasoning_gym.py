"""The reasoning-gym example: verifier, splits, tokenizer, figures and a quick run end to end."""

from __future__ import annotations

import json
import sys
from itertools import combinations

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("rich")
pytest.importorskip("reasoning_gym")

from examples.reasoning_gym_grpo import tasks
from examples.reasoning_gym_grpo.evaluation import change, count_correct, groups, pass_rates
from examples.reasoning_gym_grpo.grpo import QUICK, Plan
from examples.reasoning_gym_grpo.policy import MAX_ANSWER, make_model, make_tokenizer
from examples.reasoning_gym_grpo.report import Comparison, results
from examples.reasoning_gym_grpo.warm_start import encode


@pytest.fixture(scope="module")
def splits() -> dict[str, list[tasks.Row]]:
    return {
        split: [row for kind in tasks.KINDS for row in tasks.distinct_rows(kind, 0)[split]] for split in tasks.SPLITS
    }


def reward(completion: str, row: tasks.Row) -> float:
    return tasks.correct([completion], kind=[row["kind"]], entry=[row["entry"]], prompts=[row["prompt"]])[0]


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_full_marks_are_right_and_all_else_is_wrong(kind):
    for row in tasks.distinct_rows(kind, 0)["test"][:50]:
        answer = row["answer"]
        assert reward(answer, row) == 1.0
        # reasoning-gym gives partial credit to an answer that holds the right one.
        assert [reward(wrong, row) for wrong in (answer + "1", "", "~", answer + " " + answer)] == [0.0] * 4


def test_the_verifier_is_reasoning_gyms():
    """It takes what an exact comparison would not: leading zeros of a sum, and letters in the other case."""
    sums = [row for row in tasks.distinct_rows("chain_sum", 0)["test"] if int(row["answer"]) > 0]
    assert reward("0" + sums[0]["answer"], sums[0]) == 1.0
    word = tasks.distinct_rows("spell_backward", 0)["test"][0]
    assert reward(word["answer"].upper(), word) == 1.0


def test_partial_credit_and_what_cannot_be_scored_are_wrong(monkeypatch):
    row = tasks.make_rows("test", 1, 0)[0]
    assert reward(row["answer"], {**row, "entry": "{}"}) == 0.0  # an entry without an answer

    def raises(*_):
        raise ZeroDivisionError

    for score in (raises, lambda *_: 0.99):
        monkeypatch.setattr(tasks, "scorer", lambda kind, score=score: type("S", (), {"score_answer": score})())
        assert reward(row["answer"], row) == 0.0


def test_splits_share_no_prompt_whatever_the_seed(splits):
    """Another seed may sample other prompts, but none of them in another split."""
    texts = {split: {" ".join(row["prompt"].lower().split()) for row in rows} for split, rows in splits.items()}
    for one, other in combinations(texts, 2):
        assert not texts[one] & texts[other]
    for split, rows in splits.items():
        assert len(texts[split]) == len(rows), f"{split} holds a prompt twice"
    home = {row["prompt"].lower(): split for split, rows in splits.items() for row in rows}
    for kind in tasks.KINDS:
        moved = [(row["prompt"].lower(), split) for split, rows in tasks.distinct_rows(kind, 1).items() for row in rows]
        shared = [(prompt, split) for prompt, split in moved if prompt in home]
        assert len(shared) > 100
        assert all(home[prompt] == split for prompt, split in shared)


@pytest.mark.parametrize("plan", [Plan(), QUICK], ids=["default", "quick"])
def test_there_are_prompts_enough_in_equal_shares(plan):
    train = tasks.make_rows("train", plan.steps * plan.prompts_per_step, 0)
    assert len({row["prompt"] for row in train}) == plan.steps * plan.prompts_per_step
    for split, size in (("probe", plan.probe_set), ("test", plan.test_prompts)):
        rows = tasks.make_rows(split, size, 0)
        assert [sum(row["kind"] == kind for row in rows) for kind in tasks.KINDS] == [size // 4] * 4
    with pytest.raises(ValueError, match="Lower it"):
        tasks.make_rows("test", 10**6, 0)


def test_tokenizer_gives_every_prompt_and_answer_back(splits):
    tokenizer = make_tokenizer()
    rows = [row for rows in splits.values() for row in rows[::5]]
    for column in ("prompt", "answer"):
        texts = [row[column] for row in rows]
        ids = tokenizer(texts)["input_ids"]
        assert tokenizer.batch_decode(ids) == texts
        if column == "answer":
            assert max(map(len, ids)) + 1 <= MAX_ANSWER  # and end-of-sequence
            assert all(len(i) == len(text) for i, text in zip(ids, texts, strict=True))
        else:
            assert max(map(len, ids)) < 16, "the wording of a task is no longer one token"


def test_only_answers_are_learned_and_padding_on_the_left_changes_nothing():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, 0, hidden=32, layers=2)
    rows = tasks.make_rows("test", 8, 0)
    batch = encode(tokenizer, rows)
    for ids, mask, labels, row in zip(*batch.values(), rows, strict=True):
        assert tokenizer.decode(ids[mask.bool()]) == row["prompt"] + row["answer"] + "<eos>"
        assert tokenizer.decode(labels[labels >= 0]) == row["answer"] + "<eos>"
        assert mask.tolist() == sorted(mask.tolist())
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, -1]
        alone = torch.cat([model(**encode(tokenizer, [row])).logits[:, -1] for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_counting_is_reproducible_and_leaves_the_random_state():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, 0, hidden=16, layers=1)
    rows = tasks.make_rows("test", 8, 0)
    state = torch.get_rng_state()
    assert torch.equal(*(count_correct(model, tokenizer, rows, 8, seed=3) for _ in range(2)))
    assert torch.equal(torch.get_rng_state(), state)


def test_rates_and_paired_changes():
    """Two samples, k = 2: a prompt counts when one of them is right."""
    rows = [{"kind": kind} for kind in "aabb"]
    before, after = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 2, 2, 0])
    members = groups(rows)
    assert {name: mask.tolist() for name, mask in members.items()} == {
        "all": [True] * 4,
        "a": [True, True, False, False],
        "b": [False, False, True, True],
    }
    assert pass_rates(before, 2, 1, members["all"]).mean == pytest.approx(0.5)
    assert pass_rates(before, 2, 2, members["all"]).mean == pytest.approx(0.75)
    assert pass_rates(before, 2, 2, members["all"]).se == pytest.approx(0.5 / 4**0.5)
    assert pass_rates(before, 2, 1, members["b"]).mean == pytest.approx(0.75)
    moved = change(before, after, 2, 1, members["a"])
    assert (moved.mean, moved.se) == (pytest.approx(0.5), pytest.approx(0.0))

    plan = Plan(k=2, test_samples=2)
    records = results(Comparison(plan, rows, before, {"observe": after}, {"observe": []}))
    assert [(r["group"], r["k"], r["prompts"]) for r in records] == [
        (name, k, size) for name, size in (("all", 4), ("a", 2), ("b", 2)) for k in (1, 2)
    ]
    assert records[0]["change"]["mean"] == pytest.approx(0.125)


@pytest.mark.slow
def test_quick_run_end_to_end(tmp_path, monkeypatch, capsys):
    from examples.reasoning_gym_grpo.__main__ import main

    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # it would last beyond this test
    seen = []
    for name in ("a", "b"):
        out = tmp_path / name
        argv = ["reasoning_gym_grpo", "--quick", "--seed", "3", "--out", str(out), "--cache", str(tmp_path / "cache")]
        monkeypatch.setattr(sys, "argv", argv)
        main()
        seen.append((out / "quick-seed3" / "results.jsonl").read_text())
        for arm in ("observe", "guarded"):
            journal = (out / "quick-seed3" / arm / "passk_guard.jsonl").read_text().splitlines()
            steps = [
                event["step"] for event in map(json.loads, journal) if event["event"] in ("refresh", "failed_refresh")
            ]
            assert steps == [0, 5]
    assert seen[0] == seen[1], "the same seed gives the same results"
    rates = [record for record in map(json.loads, seen[0].splitlines()) if record["event"] == "rates"]
    assert len(rates) == (1 + len(tasks.KINDS)) * 2 * 2
    for record in rates:
        assert 0 <= record["before"]["mean"] <= 1
        assert record["change"]["mean"] == pytest.approx(record["after"]["mean"] - record["before"]["mean"])
    printed = capsys.readouterr().out
    assert "40 held-out prompts x 16 samples" in printed
    assert all(f"{arm}: 2 refreshes (" in printed for arm in ("observe", "guarded"))
