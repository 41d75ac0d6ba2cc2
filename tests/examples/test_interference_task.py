"""The interference task: disjoint splits, exact shares, right answers, exact p(x)."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

pytest.importorskip("trl")  # the examples' own requirement

from transformers import AutoTokenizer

from examples.interference import exact, task
from examples.interference.model import make_model
from examples.interference.task import correct, make_prompts, supervised_example, tuples
from examples.interference.tokenizer import make_tokenizer
from examples.interference.train import make_config
from examples.interference.warm_start import supervised_loss


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def tiny(tokenizer):
    """A tiny model that has memorised two prompts halfway, so that p(x) is neither 0 nor 1."""
    rows = [
        {"prompt": "gS5301=", "answer": "0135", "kind": "easy"},
        {"prompt": "aS5301=", "answer": "5310", "kind": "hard"},
    ]
    model = make_model(tokenizer, seed=0, hidden=16, layers=1, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        supervised_loss(model, tokenizer, [(row["prompt"], row["answer"]) for row in rows]).backward()
        optimizer.step()
    return model, rows


def test_splits_share_out_every_tuple_once_and_never_move():
    every = [digits for split in task.SPLITS for digits in tuples(split)]
    assert len(every) == len(set(every)) == 10 * 9 * 8 * 7
    shares = {split: len(tuples(split)) / len(every) for split in task.SPLITS}
    assert shares == pytest.approx({"train": 0.6, "probe": 0.2, "test": 0.2}, abs=0.02)
    # A content hash: the same in every process and Python version, unlike hash().
    assert [tuples(split)[0] for split in ("train", "probe", "test")] == ["0124", "0123", "0128"]


def test_prompts_are_distinct_disjoint_between_splits_and_depend_on_the_seed_alone():
    for split in task.SPLITS:
        prompts = [row["prompt"] for row in make_prompts(split, 2000, seed=3)]
        assert len(set(prompts)) == len(prompts)
        assert {prompt[2:6] for prompt in prompts} <= set(tuples(split))
    random.seed(0)
    first = make_prompts("train", 64, seed=1)
    random.seed(1)
    assert make_prompts("train", 64, seed=1) == first
    assert make_prompts("train", 64, seed=2) != first


def test_shares_of_a_mixture_hold_exactly():
    for size in (20, 768, 1920):
        counts = Counter(row["kind"] for row in make_prompts("train", size, seed=0))
        assert (counts["easy"], counts["hard"]) == (round(0.70 * size), round(0.15 * size))
        assert counts.total() == size
    counts = Counter(row["kind"] for row in make_prompts("probe", 64, seed=0, mixture={"easy": 0.8, "neutral": 0.2}))
    assert counts == {"easy": 51, "neutral": 13}


def test_answers_are_right_for_their_kind():
    for row in make_prompts("test", 400, seed=0):
        tag, op, digits = row["prompt"][0], row["prompt"][1], row["prompt"][2:6]
        ascending = sorted(digits)
        if op == "R":
            expected, kind = digits[::-1], "neutral"
        elif tag in "abcd":
            expected, kind = "".join(reversed(ascending)), "hard"
        else:
            expected, kind = "".join(ascending), "easy"
        assert (row["answer"], row["kind"]) == (expected, kind)
        assert len(set(digits)) == 4
        assert row["prompt"][6:] == "="


def test_too_many_prompts_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"at most \d+ distinct hard prompts of the test split"):
        make_prompts("test", 10**6, seed=0, mixture={"hard": 0.5, "easy": 0.5})
    with pytest.raises(ValueError, match="found 'valid'"):
        tuples("valid")


def test_warm_start_data_ignore_the_tag_and_never_leave_the_train_split():
    rng, train = random.Random(0), set(tuples("train"))
    counts = Counter()
    for _ in range(20_000):
        prompt, answer = supervised_example(rng)
        tag, op, digits = prompt[0], prompt[1], prompt[2:6]
        assert digits in train
        ascending = "".join(sorted(digits))
        named = {ascending: "ascending", ascending[::-1]: "descending"} if op == "S" else {digits: "copy"}
        counts[tag in "abcd", op, named.get(answer, "other")] += 1
    for hard_tag in (True, False):
        total = {op: sum(v for (h, o, _), v in counts.items() if (h, o) == (hard_tag, op)) for op in "SR"}
        assert counts[hard_tag, "S", "ascending"] / total["S"] == pytest.approx(0.85, abs=0.02)
        assert counts[hard_tag, "S", "descending"] / total["S"] == pytest.approx(0.08, abs=0.015)
        assert counts[hard_tag, "R", "copy"] / total["R"] == pytest.approx(0.90, abs=0.02)


def test_tokenizer_is_one_token_per_character_and_adds_none(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    prompts = [row["prompt"] for row in make_prompts("test", 50, seed=0)]
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = each(text=prompts)["input_ids"]
        assert {len(row) for row in ids} == {7}
        assert each.batch_decode(ids) == prompts
        assert each.decode([*each("0123")["input_ids"], each.eos_token_id], skip_special_tokens=True) == "0123"
        assert (each.pad_token_id, each.eos_token_id, len(each)) == (0, 1, len(task.ALPHABET) + 2)
        assert each.padding_side == "left"


def test_model_size_and_seed(tokenizer):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model, again = make_model(tokenizer, seed=5), make_model(tokenizer, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(p.numel() for p in model.parameters()) == 647_808
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@torch.no_grad()
def test_exact_probability_is_the_product_of_next_token_probabilities(tiny, tokenizer):
    """Token by token from growing prefixes, where no shift, padding or teacher forcing can go wrong."""
    model, rows = tiny
    for row, p in zip(rows, exact.success_probability(model, tokenizer, rows), strict=True):
        prefix = tokenizer(row["prompt"])["input_ids"]
        product_of_steps = 1.0
        for token in [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]:
            product_of_steps *= model(torch.tensor([prefix])).logits[0, -1].softmax(-1)[token].item()
            prefix = [*prefix, token]
        assert p.item() == pytest.approx(product_of_steps, rel=1e-4)
        assert 0.02 < p.item() < 0.98


def test_pass_at_k_and_its_breakdown(tiny, tokenizer):
    model, rows = tiny
    p = exact.success_probability(model, tokenizer, rows).double()
    values = exact.evaluate(model, tokenizer, rows, k=8)
    assert values["pass_at_1"] == pytest.approx(p.mean().item(), rel=1e-5)
    assert values["easy/pass_at_8"] == pytest.approx(1 - (1 - p[0].item()) ** 8, rel=1e-5)
    assert values["pass_at_8"] == pytest.approx((values["easy/pass_at_8"] + values["hard/pass_at_8"]) / 2, rel=1e-5)


def test_gradient_cosine_matches_weighted_gradients_and_leaves_no_trace(tiny, tokenizer):
    """Against E[w_k grad p], prompt by prompt: the definition, not the derivative of J_k."""
    model, rows = tiny
    model.zero_grad(set_to_none=True)
    cosine = exact.gradient_cosine(model, tokenizer, rows, [1, 8])
    assert all(p.grad is None for p in model.parameters())
    assert cosine[1] == pytest.approx(1.0)

    g1, g8 = 0.0, 0.0
    for row in rows:
        p = exact.success_probability(model, tokenizer, [row])[0]
        grad = torch.cat([g.flatten() for g in torch.autograd.grad(p, list(model.parameters()))]).double()
        g1 = g1 + grad
        g8 = g8 + 8 * (1 - p.item()) ** 7 * grad
    assert cosine[8] == pytest.approx((g1 @ g8 / (g1.norm() * g8.norm())).item(), abs=1e-4)


def test_reward_is_the_exact_string():
    assert correct(["0135", "0153", "013", "01350"], ["0135"] * 4, kind=["easy"] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_one_batch_of_512_is_one_step(tmp_path):
    config = make_config(tmp_path, steps=60, seed=0, report_to="none")
    assert (config.generation_batch_size, config.steps_per_generation, config.num_iterations) == (512, 1, 1)
