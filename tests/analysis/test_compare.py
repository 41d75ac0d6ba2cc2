"""`compare` and `passk-guard compare` on tiny checkpoints: numbers, exit status, formats, and what is refused."""

import inspect
import json
import math
import sys
import weakref

import pytest
import torch

from passk_guard import Comparison, GuardError, compare
from passk_guard.analysis import analyze
from passk_guard.analysis import compare as compare_module  # the module: the function is in the package above
from passk_guard.cli import compare as command_function
from passk_guard.cli import main
from passk_guard.reporting.html.page import packed_plotly
from tests.analysis.cases import save_model, write_probe
from tests.helpers.hostile import Page
from tests.helpers.tiny import digit_reward, probe_rows, tiny_chat_rows, tiny_model, tiny_tokenizer

SMALL = {"num_samples": 8, "max_new_tokens": 4, "batch_size": 32}


def broken_model():
    """A model that says "a" or "b" and never a digit: all other logits are 0, and one of these two is far above."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    far = 1e4 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for text, row in (("a", far), ("b", -far)):
            model.lm_head.weight[tokenizer(text)["input_ids"][0]] = row
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three checkpoints and a probe."""
    place = tmp_path_factory.mktemp("compare")
    good = save_model(place / "good", "llama")
    for name, model in (("other", tiny_model("llama", seed=1)), ("broken", broken_model())):
        model.save_pretrained(place / name)
        tiny_tokenizer().save_pretrained(place / name)
    write_probe(place / "probe.jsonl")
    return good.parent


@pytest.fixture
def run(folders, capsys):
    def call(a, b, *more, probe="probe.jsonl", correct="tests.helpers.tiny:digit_reward"):
        given = ["compare", str(folders / a), str(folders / b), "--prompts", str(folders / probe), "--correct", correct]
        small = ["--num-samples", "8", "--max-new-tokens", "4", "--batch-size", "32"]
        status = main([*given, *small, *more])
        out, err = capsys.readouterr()
        lines = err.splitlines(keepends=True)
        return status, out, "".join(line for line in lines if line.strip() and "Loading weights" not in line)

    return call


def counts_by_analyze(model, out):
    """Correct ones of 8 samples of each prompt, read from the completions that `analyze` keeps."""
    analyze(model, tiny_tokenizer(), probe_rows(13), digit_reward, out=out, ks=(1, 2), sketch_dim=256, **SMALL)
    kept = [json.loads(line) for line in (out / "rollouts" / "rank0.jsonl").read_text().splitlines()]
    return [int(sum(digit_reward(line["completions"]))) for line in sorted(kept, key=lambda line: line["place"])]


def test_differences_are_those_of_a_loop_over_the_samples_of_analyze(tmp_path):
    a, b = tiny_model("llama"), tiny_model("llama", seed=1)
    found = compare((a, tiny_tokenizer()), (b, tiny_tokenizer()), probe_rows(13), digit_reward, **SMALL)
    counts = [counts_by_analyze(model, tmp_path / name) for model, name in ((a, "a"), (b, "b"))]
    assert counts[0] != counts[1]
    assert found.ks == tuple(range(1, 9))
    for i, k in enumerate(found.ks):
        rates = [[1 - math.comb(8 - c, k) / math.comb(8, k) for c in one] for one in counts]
        each = [y - x for x, y in zip(*rates, strict=True)]
        mean = sum(each) / 13
        error = math.sqrt(sum((d - mean) ** 2 for d in each) / 12 / 13)
        assert found.pass_a[i] == pytest.approx(sum(rates[0]) / 13)
        assert found.pass_b[i] == pytest.approx(sum(rates[1]) / 13)
        assert found.difference[i] == pytest.approx(mean)
        assert found.standard_error[i] == pytest.approx(error)
        assert found.low[i] < mean < found.high[i]
    assert (found.num_prompts, found.left_out, found.failures, found.verifier) == (13, 0, 0, "digit_reward")


def test_a_checkpoint_against_itself(run):
    status, out, err = run("good", "good", "--format", "json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert found["difference"] == found["standard_error"] == [0.0] * 8
    assert found["low"][0] == -found["high"][0] < 0, "13 prompts alike do not say that all are"
    assert not found["established_lower"]
    status, out, _ = run("good", "good")
    assert (status, "no spread" in out, "nor is it ruled out" in out) == (0, True, True)


def test_the_page_of_a_comparison(run, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    status, out, _ = run("good", "broken", "--out", str(page), "--format", "json")
    text, found = page.read_text(encoding="utf-8"), json.loads(out)
    assert status == 1
    assert (found["gained"], len(found["lost"])) == ([], 10)
    changes = [b - a for _, a, b in found["lost"]]
    assert changes == sorted(changes)
    assert "is lower than that of A" in Page(text).text
    assert found["lost"][0][0] in Page(text).text
    assert run("good", "good", "--out", str(page))[0] == 0, "its own page is replaced"
    page.write_text("mine")
    status, out, err = run("good", "good", "--out", str(page))
    assert (status, page.read_text(), "not a page of this command" in err, "B - A" in out) == (2, "mine", True, True)
    packed_plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert 'pip install "passk-guard[report]"' in run("good", "good", "--out", str(page))[2]


def test_a_broken_checkpoint_fails_the_gate(run, folders):
    status, out, err = run("good", "broken", "--format", "json")
    found = json.loads(out)
    assert (status, err) == (1, "")
    assert found["pass_b"] == [0.0] * 8
    assert found["established_lower"]
    assert found["high_1"] < 0
    assert run("broken", "good")[0] == 0
    loss = -found["high_1"]
    for tolerance, expected in ((loss - 1e-6, 1), (loss + 1e-6, 0), (0.99, 0)):
        assert run("good", "broken", "--tolerance", str(tolerance))[0] == expected


def test_the_formats_say_the_same(run, folders):
    outs = {form: run("good", "other", "--k", "1,4,8", "--format", form)[1] for form in ("text", "json", "markdown")}
    found = json.loads(outs["json"])
    assert found["ks"] == [1, 4, 8]
    assert found["a"] == str(folders / "good")
    fields = set(Comparison.__dataclass_fields__)
    assert set(found) == fields | {"version"}
    header, ruler, *rows = [line for line in outs["markdown"].splitlines() if line.startswith("|")]
    assert header.count("|") == ruler.count("|") == 7
    for i, (line, row) in enumerate(zip(outs["text"].splitlines()[-3:], rows, strict=True)):
        for name, form in (("pass_a", ".3f"), ("pass_b", ".3f"), ("difference", "+.3f"), ("low", "+.3f")):
            assert format(found[name][i], form) in line
            assert format(found[name][i], form) in row


def test_names_cannot_break_out_of_the_text():
    numbers = dict.fromkeys(("pass_a", "pass_b", "difference", "standard_error", "low", "high"), (0.5,))
    counts = {"seed": 0, "num_samples": 8, "num_prompts": 3, "left_out": 0, "failures": 2}
    bounds = {"low_1": -0.1, "high_1": 0.7, "established_lower": False, "confidence": 0.95, "tolerance": 0.2}
    one = Comparison("a\x1b[2J|b", "**x**", (1,), **numbers, **counts, **bounds, verifier="v")
    assert "\x1b" not in one.text()
    assert "a\\|b" in one.markdown()
    assert "\\*\\*x" in one.markdown()
    assert "not lower than that of A by more than 0.2" in one.text()
    assert "raised on 2 samples" in one.text()


def test_samples_do_not_depend_on_which_side_they_are_of(folders):
    sides = ("good", "other"), ("other", "good")
    both = [compare(folders / a, folders / b, folders / "probe.jsonl", digit_reward, **SMALL) for a, b in sides]
    assert both[0].pass_a == both[1].pass_b
    assert both[0].difference == tuple(-d for d in both[1].difference)
    assert both[0].low == tuple(-high for high in both[1].high)


def test_one_model_is_in_memory_at_a_time(folders, monkeypatch):
    load, models, alive = compare_module.load_model, [], []

    def loaded(*given, **options):
        alive.append(sum(one() is not None for one in models))
        model = load(*given, **options)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(compare_module, "load_model", loaded)
    compare(folders / "good", folders / "other", folders / "probe.jsonl", digit_reward, **SMALL)
    assert alive == [0, 0]


def test_a_limit_chooses_the_prompts_of_analyze(folders):
    seen = []

    def reward(prompts, completions, **_):
        seen.append(list(dict.fromkeys(p[0]["content"] for p in prompts)))
        return digit_reward(completions)

    pair = (tiny_model(), tiny_tokenizer())
    found = compare(pair, pair, tiny_chat_rows(9), reward, prompts=4, seed=3, **SMALL)
    analyze(*pair, tiny_chat_rows(9), reward, prompts=4, seed=3, ks=(1, 2), sketch_dim=256, **SMALL)
    assert found.num_prompts == len(seen[0]) == 4
    assert seen[0] == seen[1] == seen[2]


def test_prompts_with_too_few_verdicts_are_left_out():
    rows = probe_rows(6)

    def reward(prompts, completions, **_):
        return [None if p == rows[1]["prompt"] else r for p, r in zip(prompts, digit_reward(completions), strict=True)]

    pair = (tiny_model(), tiny_tokenizer())
    found = compare(pair, pair, rows, reward, **SMALL)
    assert (found.num_prompts, found.left_out) == (5, 1)
    with pytest.raises(GuardError, match="3 prompts with 8 verdicts, the largest k, from A and B; found 2 of 3"):
        compare(pair, pair, rows[:3], reward, **SMALL)


def test_adapters_find_their_base(folders, tmp_path, run):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = peft.get_peft_model(tiny_model("llama"), config)
    adapter.peft_config["default"].base_model_name_or_path = "org/hub-model"
    adapter.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    status, _, err = run("good", tmp_path / "lora")
    assert (status, "Nothing is downloaded" in err) == (2, True)
    status, out, _ = run("good", tmp_path / "lora", "--base", str(folders / "good"), "--format", "json")
    expected = compare(
        (tiny_model("llama"), tiny_tokenizer()), (adapter, tiny_tokenizer()), probe_rows(13), digit_reward, **SMALL
    )
    assert status == int(expected.established_lower)
    assert json.loads(out)["difference"] == list(expected.difference)
    assert any(expected.difference)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--k", "1,16"), "num_samples=8, k=16"),
        (("--tolerance", "1"), "0 <= `tolerance` < 1"),
        (("--tolerance", "-0.1"), "0 <= `tolerance` < 1"),
        (("--tolerance", "nan"), "0 <= `tolerance` < 1"),
        (("--confidence", "1"), "`confidence`"),
        (("--limit", "2"), "`prompts`: Input should be greater than or equal to 3"),
        (("--limit", "99"), "at most 13"),
        (("--num-samples", "1"), "`num_samples`"),
        (("--max-new-tokens", "64"), "do not fit"),
        (("--base", "x"), "`base` with an adapter"),
        (("--correct", "tests.helpers.tiny:no_such"), "'no_such'"),
        (("--prompts", "no_such.jsonl"), "found no file"),
    ],
)
def test_arguments(more, words, run):
    status, out, err = run("good", "other", *more)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_checkpoints_that_are_none_are_refused_before_anything_is_sampled(run, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_module, "_measure", lambda *_: pytest.fail("sampled"))
    tiny_model().save_pretrained(tmp_path / "no_tokenizer")
    for b, words in (("nowhere", "found nothing"), (".", "config.json"), (tmp_path / "no_tokenizer", "tokenizer")):
        status, _, err = run("good", b)
        assert status == 2
        assert words in err
    with pytest.raises(GuardError, match=r"a pair \(model, tokenizer\); found int"):
        compare(7, folders / "good", probe_rows(13), digit_reward)


def test_too_few_prompts(run, folders):
    write_probe(folders / "two.jsonl", probe_rows(2))
    status, _, err = run("good", "other", probe="two.jsonl")
    assert (status, "at least 3 different prompts" in err) == (2, True)


def raises(completions, **_):
    raise ConnectionError("no sandbox")


def test_an_error_is_no_loss(run, monkeypatch):
    status, out, err = run("good", "broken", correct="tests.analysis.test_compare:raises")
    assert (status, out) == (2, "")
    assert "ConnectionError: no sandbox" in err
    monkeypatch.setattr(compare_module, "_measure", lambda *_: {}["slip"])
    status, out, err = run("good", "broken")
    assert (status, out) == (2, "")
    assert "KeyError" in err


def test_the_defaults_of_the_command_are_those_of_the_function():
    options, parameters = (inspect.signature(one).parameters for one in (command_function, compare))
    assert set(options) == set(parameters) | {"format", "as_json", "out", "force"}
    assert all(options[name].default == parameters[name].default for name in parameters)
