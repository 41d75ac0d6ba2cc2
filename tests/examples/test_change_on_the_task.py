"""The realised change of a small step of the weights, against exact pass rates on the interference task."""

import pytest
import torch

from examples.interference.exact import pass_at_k, success_probability
from examples.interference.model import make_model
from examples.interference.task import correct, make_prompts
from examples.interference.tokenizer import make_tokenizer
from passk_guard.change import estimate_change
from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.probe.rescoring import Rescorer
from passk_guard.probe.samplers import GenerateSampler
from passk_guard.utils.ranks import Ranks

K, SAMPLES = 8, 512


def half_trained(tokenizer, rows):
    """A small model that solves these prompts about every second time, some more often than others."""
    model = make_model(tokenizer, seed=0, hidden=32, layers=1, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(500):
        p = success_probability(model, tokenizer, rows)
        if p.mean() > 0.45:
            return model
        optimizer.zero_grad()
        (-p.log().mean()).backward()
        optimizer.step()
    raise AssertionError("the model does not learn the prompts")


def step_along(model, gradient, fall):
    """Move the weights along the gradient until pass@1 has fallen by `fall` to first order."""
    size = fall / sum(float(g.square().sum()) for g in gradient)
    with torch.no_grad():
        for parameter, g in zip(model.parameters(), gradient, strict=True):
            parameter.sub_(size * g)


@pytest.mark.parametrize("fall", [0.03, -0.03])
def test_the_change_is_the_difference_of_exact_pass_rates(fall):
    tokenizer, rows = make_tokenizer(), make_prompts("test", 24, seed=0)
    model = half_trained(tokenizer, rows)
    sampler = GenerateSampler(model, tokenizer, max_new_tokens=5, batch_size=4096)
    drawn = sampler.sample(rows, SAMPLES, seed=0)
    each = [row for row in rows for _ in range(SAMPLES)]
    verdicts = torch.tensor(correct(drawn.completions, [row["answer"] for row in each])).view(len(rows), SAMPLES)
    index = [x for x in range(len(rows)) for _ in range(SAMPLES)]
    rollouts = Rollouts(each, index, drawn.prompt_ids, drawn.completion_ids, drawn.completions, len(rows))
    rescorer = Rescorer(model, Ranks(torch.device("cpu")), 1 << 15, tokenizer.pad_token_id)
    window = rescorer.open(rollouts, Outcomes(verdicts.flatten().to(torch.int8)), range(len(rows)), 0)

    p = success_probability(model, tokenizer, rows)
    step_along(model, torch.autograd.grad(pass_at_k(p, 1), list(model.parameters())), fall)
    q = success_probability(model, tokenizer, rows).detach()
    exact_1, exact_k = (float(pass_at_k(q, k) - pass_at_k(p.detach(), k)) for k in (1, K))
    assert abs(exact_1) > 0.015

    log_ratios = rescorer.log_ratios(window)
    for n in (16, SAMPLES):
        found = estimate_change(log_ratios[:, :n], window.correct[:, :n], K)
        assert abs(found.pass_at_1 - exact_1) < 3 * found.pass_at_1_se
        assert abs(found.pass_at_k - exact_k) < 3 * found.pass_at_k_se
    assert found.pass_at_1 == pytest.approx(exact_1, rel=0.1)
    assert found.pass_at_k == pytest.approx(exact_k, rel=0.1)
    per_prompt = (q - p.detach()).double()
    assert torch.corrcoef(torch.stack([found.per_prompt, per_prompt]))[0, 1] > 0.9
