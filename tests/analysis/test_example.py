"""The example: sampled against exact, on the model it is about."""

import pytest
from transformers import AutoModelForCausalLM

from examples.analyze_checkpoint import compare, main, print_comparison
from examples.interference.model import make_model
from examples.interference.tokenizer import make_tokenizer


def test_an_untrained_model_is_undetermined_and_said_so(tmp_path, capsys):
    tokenizer = make_tokenizer()
    for part in (make_model(tokenizer, 0, hidden=16, layers=1, heads=2), tokenizer):
        part.save_pretrained(tmp_path / "cache" / "seed0")
    main(["--prompts", "12", "--samples", "4", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert said.count("undetermined") >= 3
    assert (tmp_path / "out" / "analysis.html").exists()


@pytest.mark.slow
def test_the_interval_holds_the_exact_cosine(tmp_path, capsys):
    analysis, there, elsewhere = compare("runs/warm_start", tmp_path / "out", prompts=256, samples=16)
    print_comparison(analysis, there, elsewhere)
    assert "exact" in capsys.readouterr().out
    at = next(at for at in analysis.at_k if at.k == 8)
    assert at.status == "conflict"
    assert at.cosine.low <= elsewhere[8] <= at.cosine.high
    assert elsewhere[8] < -0.3
    rates = [p.pass_rate.value for p in analysis.prompts]
    assert sum(rates) / len(rates) == pytest.approx(analysis.at_k[0].pass_rate.value)
    AutoModelForCausalLM.from_pretrained(analysis.model["name"])
