"""Completions scored under two policies, against one sample at a time: what counts, what fails, what is kept."""

import dataclasses
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import pytest
import torch

from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.probe.rescoring import Rescorer, load_window, save_window
from passk_guard.utils.errors import FailedRefresh, GuardError
from passk_guard.utils.ranks import Ranks
from tests.helpers.tiny import tiny_model
from tests.sketch.test_formulas import tiny_cpmant

PROMPTS = [[9, 10], [11], [12, 13, 14]]
KEYS = ("a", "b", "c")


def sampled(per_prompt=4, temperature=0.7):
    generator = torch.Generator().manual_seed(0)
    index = [x for x in range(3) for _ in range(per_prompt)]
    lengths = torch.randint(1, 6, (len(index),), generator=generator).tolist()
    completions = [torch.randint(6, 70, (length,), generator=generator).tolist() for length in lengths]
    verdicts = torch.randint(0, 2, (len(index),), generator=generator).to(torch.int8)
    rollouts = Rollouts(
        [{}] * len(index), index, [PROMPTS[x] for x in index], completions, [""] * len(index), 3, temperature
    )
    return rollouts, Outcomes(verdicts)


def rescorer(model, max_tokens=64, **settings):
    return Rescorer(model, Ranks(torch.device("cpu")), max_tokens, 0, **settings)


def one_at_a_time(model, rollouts):
    """Log-probabilities by a plain forward pass for each sample, without padding."""
    found = []
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        ids = torch.tensor([list(prompt) + list(completion)])
        with torch.no_grad():
            log_p = (model(input_ids=ids).logits[0].double() / rollouts.temperature).log_softmax(-1)
        places = range(len(prompt), ids.shape[1])
        found.append(sum(float(log_p[t - 1, ids[0, t]]) for t in places))
    return torch.tensor(found, dtype=torch.float64).view(3, -1)


@pytest.mark.parametrize("max_tokens", [1, 20, 1000])
def test_both_scores_are_those_of_one_sample_at_a_time(max_tokens):
    model, (rollouts, outcomes) = tiny_model(), sampled()
    scorer = rescorer(model, max_tokens)
    window = scorer.open(rollouts, outcomes, KEYS, 7)
    before = one_at_a_time(model, rollouts)
    torch.testing.assert_close(window.log_probs, before, rtol=0, atol=1e-4)
    assert window.correct.tolist() == outcomes.correct.view(3, -1).tolist()
    assert torch.equal(scorer.log_ratios(window), torch.zeros(3, 4, dtype=torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    expected = one_at_a_time(model, rollouts) - before
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(scorer.log_ratios(window), expected, rtol=0, atol=2e-4)


def test_logits_of_a_pass_are_bounded_by_the_vocabulary(monkeypatch):
    monkeypatch.setattr("passk_guard.probe.rescoring._LOGITS", 76 * 12)
    model, (rollouts, outcomes) = tiny_model(), sampled()
    window = rescorer(model, 1000, vocabulary=76).open(rollouts, outcomes, KEYS, 0)
    assert max(batch.input_ids.numel() for batch in window.batches) <= 12
    assert len(rescorer(model, 1000).open(rollouts, outcomes, KEYS, 0).batches) == 1


def test_samples_that_do_not_count_are_not_scored():
    rollouts, outcomes = sampled()
    verdicts = outcomes.correct.clone()
    verdicts[[1, 5]] = -1
    rollouts = dataclasses.replace(rollouts, prompt_index=[*rollouts.prompt_index[:-1], -1])
    measured = torch.tensor([True, False, True])
    window = rescorer(tiny_model()).open(rollouts, Outcomes(verdicts), KEYS, 0, measured)
    expected = verdicts.view(3, -1).clone()
    expected[1], expected[2, 3] = -1, -1
    assert window.correct.tolist() == expected.tolist()
    assert (window.log_probs == 0).tolist() == (expected == -1).tolist()
    assert sum(len(batch.slots) for batch in window.batches) == int((expected >= 0).sum())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_model_is_left_as_it_was(precision):
    model, (rollouts, outcomes) = tiny_model(attention_dropout=0.5).train(), sampled()
    state = torch.get_rng_state()
    scorer = rescorer(model, precision=precision)
    window = scorer.open(rollouts, outcomes, KEYS, 0)
    assert torch.equal(scorer.log_ratios(window), torch.zeros(3, 4, dtype=torch.float64)), "dropout is off"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_when_memory_runs_out_a_window_goes_on_in_smaller_batches(monkeypatch):
    model, (rollouts, outcomes) = tiny_model(), sampled()
    scorer = rescorer(model, 1000)
    window = scorer.open(rollouts, outcomes, KEYS, 0)
    forward, sizes = model.forward, []

    def short(input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", short)
    found = scorer.log_ratios(window)
    assert sizes[0] == 12
    assert max(sizes[-4:]) <= 3
    torch.testing.assert_close(found, torch.zeros(3, 4, dtype=torch.float64), rtol=0, atol=1e-4)


def test_log_probabilities_that_are_not_finite_fail_the_window():
    model, (rollouts, outcomes) = tiny_model(), sampled()
    scorer = rescorer(model)
    window = scorer.open(rollouts, outcomes, KEYS, 0)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FailedRefresh, match="log-probability of the probe's completions is not finite"):
        scorer.log_ratios(window)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16", "autocast"])
def test_the_noise_of_rounding_is_that_of_a_policy_that_moved(weights):
    """The oracle: log ratios of the same weights in float32."""
    rollouts, outcomes = sampled(60)
    model = tiny_model().to(weights)
    half = partial(torch.autocast, "cpu", torch.bfloat16) if weights == torch.float32 else nullcontext
    scorer = rescorer(model, 1000, autocast=half, precision=torch.bfloat16)
    exact = lambda: one_at_a_time(deepcopy(model).float(), rollouts)  # noqa: E731
    window, before = scorer.open(rollouts, outcomes, KEYS, 0), exact()
    assert torch.equal(scorer.log_ratios(window), torch.zeros(3, 60, dtype=torch.float64)), "no trace of the jitter"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    error = scorer.log_ratios(window) - (exact() - before)
    assert window.noise == pytest.approx(float(error.square().mean().sqrt()), rel=0.3)


def test_only_rounded_scores_are_taken_twice(monkeypatch):
    model, (rollouts, outcomes) = tiny_model(), sampled()
    forward, calls = model.forward, []
    monkeypatch.setattr(model, "forward", lambda **given: calls.append(1) or forward(**given))
    assert rescorer(model, 1000).open(rollouts, outcomes, KEYS, 0).noise is None
    assert len(calls) == 1
    assert rescorer(model, 1000, precision=torch.float16).open(rollouts, outcomes, KEYS, 0).noise > 0
    assert len(calls) == 3
    nothing = Outcomes(torch.full((12,), -1, dtype=torch.int8))
    assert rescorer(model, precision=torch.bfloat16).open(rollouts, nothing, KEYS, 0).noise == 0


def test_a_window_survives_a_checkpoint(tmp_path):
    model, (rollouts, outcomes) = tiny_model(), sampled()
    scorer = rescorer(model, 20, precision=torch.bfloat16)
    window = scorer.open(rollouts, outcomes, KEYS, 3)
    save_window(window, tmp_path / "window.pt")
    again = load_window(tmp_path / "window.pt", torch.device("cpu"))
    assert (again.step, again.keys, again.temperature, again.noise) == (3, KEYS, 0.7, window.noise)
    assert torch.equal(again.correct, window.correct)
    assert torch.equal(scorer.log_ratios(again), torch.zeros(3, 4, dtype=torch.float64))
    (tmp_path / "damaged.pt").write_bytes((tmp_path / "window.pt").read_bytes()[:500])
    assert load_window(tmp_path / "damaged.pt", torch.device("cpu")) is None
    assert load_window(tmp_path / "absent.pt", torch.device("cpu")) is None


def test_a_model_that_reads_its_padding_is_refused_where_there_is_some():
    model, (rollouts, outcomes) = tiny_cpmant(pad_token_id=0), sampled()
    small = [[token % 33 + 6 for token in completion] for completion in rollouts.completion_ids]
    pair, scorer = (dataclasses.replace(rollouts, completion_ids=small), outcomes), rescorer(model)
    for maker, padded in ((scorer, True), (rescorer(model, max_tokens=1), False)):
        window = maker.open(*pair, KEYS, 0)
        assert any(not batch.attention_mask.all() for batch in window.batches) == padded
        with pytest.raises(GuardError, match="logits do not depend on padding") if padded else nullcontext():
            assert not maker.check_padding(window)
    assert rescorer(tiny_model()).check_padding(rescorer(tiny_model()).open(*pair, KEYS, 0))
