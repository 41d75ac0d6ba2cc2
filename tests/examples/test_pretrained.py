"""The pretrained example: its data, its verifier, exact rates, the model folder, and the whole on a tiny model."""

import itertools
import json

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("rich")

from examples.pretrained import arithmetic, evaluation, model, task
from examples.pretrained.__main__ import main
from tests.helpers.tiny import CHARACTERS, SPECIAL, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny model folder whose tokenizer knows the signs of the task."""
    monkeypatch.setattr("tests.helpers.tiny.CHARACTERS", [*CHARACTERS, "\n"])
    tiny_model("llama", vocab_size=len(SPECIAL + CHARACTERS) + 1).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_answer_by_hand():
    assert task.make_prompt("n", "nine") == "How many n are there in n-i-n-e?\n"
    assert task.right_answer("n", "nine") == "n1 i1 n2 e2 = 2"
    assert task.right_answer("q", "ab") == "a0 b0 = 0"


@pytest.mark.parametrize(
    "wrong",
    [
        *("2", "= 2", "n1 i1 n2 e2", "n1 i1 n2 e2 =", "n1 i1 n2 e2 = 3", "n1 n2 e2 = 2", "n1 i1 n2 e3 = 2", ""),
        *("n1 i1 n2 e2 = 22", "n1 i1 n2 e2 = 2.", "n1 i1 n2 e2 = 2\n", "N1 i1 n2 e2 = 2", "n1 i1 n2 e2 = 2 n1 = 1"),
    ],
)
def test_partial_forms_are_refused(wrong):
    assert task.correct(["n1 i1 n2 e2 = 2", wrong], ["n1 i1 n2 e2 = 2"] * 2, prompts=[""] * 2) == [1.0, 0.0]


def test_rows_are_distinct_in_equal_shares_of_length_and_count():
    splits = {split: task.make_rows(split, 400, seed=1) for split in task.SPLITS}
    prompts = {split: {row["prompt"] for row in rows} for split, rows in splits.items()}
    assert all(len(found) == 400 for found in prompts.values())
    assert not any(a & b for a, b in itertools.combinations(prompts.values(), 2))
    for split, rows in splits.items():
        assert rows == task.make_rows(split, 400, seed=1)
        assert {task.split_of(row["prompt"]) for row in rows} == {split}
        for length in task.LENGTHS:
            own = [row for row in rows if row["length"] == length]
            assert len(own) == 100
            counts = [int(row["answer"][-1]) for row in own]
            assert set(counts) == set(range(length))
            for row, count in zip(own, counts, strict=True):
                letter, word = row["prompt"][9], row["prompt"].split(" in ")[1].removesuffix("?\n").replace("-", "")
                assert (word.count(letter), len(word), row["answer"]) == (
                    count,
                    length,
                    task.right_answer(letter, word),
                )
    assert {row["prompt"] for row in task.make_rows("test", 400, seed=2)} != prompts["test"]
    assert {row["length"] for row in task.make_rows("test", 40, seed=1, longest=4)} == {2, 4}


def test_exact_rates_are_the_products_of_a_loop(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = task.make_rows("test", 10, seed=0)
    policy.train()
    found = evaluation.success_probability(policy, tokenizer, rows, batch=4)
    assert policy.training
    for row, p in zip(rows, found.tolist(), strict=True):
        ids, product = tokenizer(row["prompt"])["input_ids"], 1.0
        for token in [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]:
            with torch.no_grad():
                product *= float(policy(torch.tensor([ids])).logits[0, -1].double().softmax(-1)[token])
            ids = [*ids, token]
        assert p == pytest.approx(product, rel=1e-4)
    p = torch.tensor([0.5, 0.25, 0.0, 1.0], dtype=torch.float64)
    of = evaluation.rates(p, [{"length": n} for n in (2, 2, 4, 4)], 2)
    assert of["2"] == pytest.approx({"pass_at_1": 0.375, "pass_at_2": (0.75 + 1 - 0.75**2) / 2})
    assert of["all"]["pass_at_1"] == pytest.approx(0.4375)
    assert evaluation.rates(p * 1e-30, [{"length": 2}] * 4, 2)["all"]["pass_at_2"] == pytest.approx(2 * 0.4375e-30)


def test_a_model_whose_config_says_quantised_can_be_saved(tmp_path):
    loaded = tiny_model("llama", tie_word_embeddings=True)
    loaded.config.quantization_config = {"quant_method": "gguf"}
    model.fresh(loaded).save_pretrained(tmp_path)
    again = type(loaded).from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    for name, weight in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        *((text, 1.0) for text in ("12", " 12.", "12. The", "12, but", "12\n")),
        *((text, 0.0) for text in ("1", "-12", "123", "12.5", "12,000", "12 * 3", "12 = 1", "x12", "the 12", "")),
    ],
)
def test_the_number_at_the_start_is_right_in_arithmetic(text, right):
    assert arithmetic.correct(["7", text], ["-7", "12"], prompts=[""] * 2) == [0.0, right]


def test_the_questions_of_arithmetic_begin_the_answer():
    pytest.importorskip("reasoning_gym")
    rows = arithmetic.make_rows(each=10)
    assert len({row["prompt"] for row in rows}) == 30
    assert all(row["prompt"].endswith("<|im_start|>assistant\nThe answer is ") for row in rows)
    assert [row["kind"] for row in rows[:3]] == list(arithmetic.KINDS)
    assert arithmetic.correct([row["answer"] for row in rows], [row["answer"] for row in rows]) == [1.0] * 30


def test_both_trainings_and_the_report_on_a_tiny_model(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("examples.pretrained.train.correct", _vowel)
    sizes = (
        "--sft-steps 2 --sft-batch 4 --steps 4 --prompts-per-step 1 --refresh-steps 2 --probe-prompts 4 --probe-set 8"
    )
    command = ["--quick", *sizes.split(), "--test-prompts", "4", "--model", str(folder), "--out", str(tmp_path)]
    main([*command, "--mitigations", "none", "reweight"])
    first, second = lines = (tmp_path / "results.jsonl").read_text().splitlines()
    one, two = json.loads(first), json.loads(second)
    assert [(r["mitigation"], r["seed"], r["plan"]["steps"]) for r in (one, two)] == [
        ("none", 0, 4),
        ("reweight", 0, 4),
    ]
    assert one["before"] == two["before"]
    assert one["after"] != one["before"]
    assert [window["step"] for window in one["guard"]["windows"]] == [2]
    groups = one["guard"]["windows"][0]["groups"]
    assert 0 < len(set(groups) & {"2", "4", "6", "8"}) == len(groups)
    main([*command, "--mitigations", "none", "reweight"])
    assert (tmp_path / "results.jsonl").read_text().splitlines() == lines, "what is there is not made again"
    assert "reweight" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path / "none")])
    assert "make pretrained" in capsys.readouterr().err


def _vowel(completions, **_):
    """Right and wrong both occur in the completions of an untrained model."""
    return [float(any(letter in text[:2] for letter in "aeiou")) for text in completions]
