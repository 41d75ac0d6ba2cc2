"""The command and the function on tiny checkpoints: what is written, and what is left alone."""

import html
import json
import random
import re
from pathlib import Path

import pytest
import torch

from passk_guard import GuardError, pass_at_k
from passk_guard.analysis import Analysis, Settings, analyze
from passk_guard.analysis.measure import estimate_each
from passk_guard.estimation import estimate
from tests.analysis.cases import QUICK, PromptSampler, command, quick, save_model, write_probe
from tests.helpers.populations import draw, population
from tests.helpers.tiny import digit_reward, probe_rows, tiny_chat_rows, tiny_model, tiny_tokenizer

EARLIER = Path(__file__).parents[1] / "data" / "earlier" / "analysis.json"


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_checkpoint_directory_gives_tables_json_and_a_page(kind, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(save_model(tmp_path / "model", kind), write_probe(tmp_path / "probe.jsonl"), out) == 0
    found = json.loads((out / "analysis.json").read_text())
    kept = [json.loads(line) for line in (out / "rollouts" / "rank0.jsonl").read_text().splitlines()]
    right = [sum(digit_reward(line["completions"])) for line in sorted(kept, key=lambda line: line["place"])]
    assert [p["num_correct"] for p in found["prompts"]] == right
    for at in found["at_k"]:
        expected = float(pass_at_k(8, torch.tensor(right), at["k"]).mean())
        assert at["pass_rate"]["value"] == pytest.approx(expected)
    assert [p["text"] for p in found["prompts"]] == [row["prompt"] for row in probe_rows(13)]
    assert found["model"]["name"] == str(tmp_path / "model")
    assert (
        found["sketch"]["covered"] == found["sketch"]["total"] == sum(p.numel() for p in tiny_model(kind).parameters())
    )
    page = (out / "analysis.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "http" not in page.replace("http-equiv", "")
    assert "pass@k and its angle to pass@1" in capsys.readouterr().out


def test_the_record_survives_json(tmp_path):
    analysis = quick()
    analysis.save(tmp_path)
    text = (tmp_path / "analysis.json").read_text()
    assert Analysis.from_dict(json.loads(text)) == analysis
    assert "NaN" not in text
    assert "Infinity" not in text
    with pytest.raises(GuardError, match="version"):
        Analysis.from_dict(json.loads(text) | {"version": 99})
    with pytest.raises(GuardError, match="`verifier`: Field required"):
        Analysis.from_dict({k: v for k, v in json.loads(text).items() if k != "verifier"})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_model_and_the_random_state_come_back_as_they_were():
    model = tiny_model(attention_dropout=0.3).train()
    model.lm_head.weight.requires_grad_(False)
    tokenizer = tiny_tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    analyze(model, tokenizer, probe_rows(5), digit_reward, last_layer=True, **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_same_call_gives_the_same_numbers_and_another_seed_others():
    def pass_rates(seed):
        analysis = analyze(tiny_model(), tiny_tokenizer(), probe_rows(5), digit_reward, **QUICK, seed=seed)
        return [p.num_correct for p in analysis.prompts], analysis.at_k[-1].inner_product

    assert pass_rates(0) == pass_rates(0)
    assert pass_rates(0) != pass_rates(1)


def test_a_verifier_that_draws_random_numbers_repeats_itself_and_leaves_no_trace():
    def reward(completions, **_):
        return [float(random.random() + float(torch.rand(())) > 1) for _ in completions]

    def verdicts():
        analysis = analyze(tiny_model(), tiny_tokenizer(), probe_rows(5), reward, sampler=PromptSampler(), **QUICK)
        return [p.num_correct for p in analysis.prompts]

    states = random.getstate(), torch.get_rng_state()
    first = verdicts()
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    random.random()
    torch.rand(())
    assert verdicts() == first


def test_conversations_and_drawn_prompts():
    analysis = analyze(tiny_model(), tiny_tokenizer(), tiny_chat_rows(9), digit_reward, **QUICK, prompts=4)
    assert len(analysis.prompts) == analysis.num_prompts == 4
    assert all(p.text.startswith("user: ") for p in analysis.prompts)


def test_no_signal_is_said_in_words_and_not_in_numbers():
    """Every completion right: no gradient anywhere."""
    analysis = quick(rows=probe_rows(5), correct_threshold=-1.0)
    assert analysis.always_solved == 5
    assert analysis.curve is None
    for at in analysis.at_k[1:]:
        assert at.status == "undetermined"
        assert at.cosine.value is None
        assert "always solved" in at.reason
    assert all(p.agreement.value is None for p in analysis.prompts)
    assert all(one.cosine.value is None for one in analysis.predictions)
    page = html.unescape(analysis._repr_html_())
    assert "Undetermined" in page
    shown = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.search(r"\bnan\b", shown, flags=re.I)


def test_an_analysis_of_an_earlier_version_is_read_field_by_field():
    """Written when analysis.json had the paper's table and its settings, which are passed over."""
    written = json.loads(EARLIER.read_text())
    assert written["paper"]["rows"]
    found = Analysis.from_dict(written).to_dict()
    gone = {"protocol", "delta_1", "delta_2"}
    kept = {name: value for name, value in written["settings"].items() if name not in gone}
    assert found["settings"] == {"cluster_by": None} | kept
    assert written.keys() - found.keys() == {"paper"}
    band = ("band_low", "band_high", "k_star_low", "k_star_high")
    assert [found["curve"].pop(name) for name in band] == [None] * 4
    for name in found.keys() - {"settings"}:
        assert json.loads(json.dumps(found[name])) == written[name], name


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("num_prompts",), "20", "`num_prompts`: Input should be a valid integer; found '20'"),
        (("at_k", 1, "status"), "calm", "`at_k.1.status`"),
        (("at_k", 1, "cosine", "value"), 1e301, "`at_k.1.cosine.value`"),
        (("at_k", 1, "k"), 3, "not one entry for every k"),
        (("curve", "cosine"), [], "`curve`: not a number for every k"),
        (("curve", "band_low"), [0.0] * 16, "a part of the band"),
        (("kernel", "places"), [0], "not a triangle"),
        (("kernel", "negative_pairs", "value"), True, "valid number; found True"),
        (("prompts", 0, "pass_rate", "value"), None, "without its pass rate"),
        (("prompts", 0, "hurts"), [[1]], "`prompts.0.hurts.0.1`: Field required"),
        (("prompts", 0, "novelty"), 1, "`prompts.0.novelty`"),
        (("sketch", "covered"), 1001, "more parameters covered"),
        (("model",), {"name": "m"}, "a fingerprint"),
        (("settings", "gamma"), 2.0, "`gamma`"),
        (("settings", "novelty"), 2.0, "other names"),
        (("noise", "degrees"), 0, "noise of a refresh"),
    ],
)
def test_a_value_that_no_analysis_has_is_named(where, value, words):
    data = json.loads(EARLIER.read_text())
    holder = data
    for step in where[:-1]:
        holder = holder[step]
    holder[where[-1]] = value
    with pytest.raises(GuardError, match=re.escape(words)):
        Analysis.from_dict(data)


def test_the_curve_over_k_is_computed_once(monkeypatch):
    calls = []
    curve = estimate._curve
    monkeypatch.setattr(estimate, "_curve", lambda *given: calls.append(given) or curve(*given))
    probe = draw(population(-0.5), 128, 16, torch.Generator().manual_seed(0))
    found = estimate_each(probe, Settings(ks=(1, 2, 4, 8), num_samples=16))
    assert list(found) == [2, 4, 8]
    assert len(calls) == sum(one.curve is not None for one in found.values()) == 1


def test_k_1_alone_has_nothing_to_conflict_with():
    analysis = quick(ks=(1,))
    assert [at.k for at in analysis.at_k] == [1]
    assert analysis.predictions == []
    assert "nothing to conflict" in analysis._repr_html_()


def test_a_prompt_with_too_few_verdicts_is_left_out_and_the_places_stay():
    rows = probe_rows(6)

    def reward(prompts, completions, **_):
        return [None if p == rows[1]["prompt"] else r for p, r in zip(prompts, digit_reward(completions), strict=True)]

    analysis = analyze(tiny_model(), tiny_tokenizer(), rows, reward, **QUICK)
    assert analysis.left_out == 1
    assert [p.place for p in analysis.prompts] == [0, 2, 3, 4, 5]
    assert [p.text for p in analysis.prompts] == [rows[i]["prompt"] for i in (0, 2, 3, 4, 5)]
    assert "1 prompts had fewer than 4" in analysis.remark
