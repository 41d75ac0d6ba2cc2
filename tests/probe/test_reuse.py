"""Rollouts kept over refreshes: the whole pipeline against exact gradients, and when they are dropped."""

import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from passk_guard.callback.state import Memory, load_memory, save_memory
from passk_guard.estimation.evidence import Check, RunEvidence
from passk_guard.estimation.records import ConflictEstimate
from passk_guard.estimation.ustatistics import coefficients
from passk_guard.estimation.verdict import DecisionRule, DecisionState, decide
from passk_guard.mitigation.protected_direction import pass1_loss
from passk_guard.passk.closed_forms import passk_weight
from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.probe.refresh import Refresher
from passk_guard.probe.reuse import RolloutKeeper, _in_halves, reweigh
from passk_guard.sketch import ScoreSketcher
from passk_guard.utils.errors import FailedRefresh
from passk_guard.utils.ranks import Ranks
from tests.callback.test_guard import guard_of, run
from tests.helpers.tiny import tiny_grpo_trainer, tiny_lm_trainer, tiny_model

PROMPTS, N = [[7, 9, 11], [20, 8], [33, 12, 40, 5], [61, 22]], 6


def moved(model, size):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def next_token(model, prompt):
    return model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)


def drawn_from(model, generator, times=1):
    """One token each: right where it is even; so that p and its gradient are known exactly. Of each prompt so often."""
    with torch.no_grad():
        policy = [next_token(model, prompt).exp() for prompt in PROMPTS]
    prompts = [x for _ in range(times) for x in range(len(PROMPTS))]
    tokens = [torch.multinomial(policy[x], N, True, generator=generator).tolist() for x in prompts]
    flat = [token for row in tokens for token in row]
    index = [i for i in range(len(prompts)) for _ in range(N)]
    ids, size = [PROMPTS[prompts[i]] for i in index], len(flat)
    rollouts = Rollouts([{}] * size, index, ids, [[t] for t in flat], ["x"] * size, len(prompts))
    return rollouts, Outcomes(torch.tensor([t % 2 == 0 for t in flat], dtype=torch.int8))


def refresher(model, method="identity", max_tokens=40):
    return Refresher(
        ScoreSketcher(model, 256, method), Ranks(torch.device("cpu")), 3, max_tokens, 0, keeps_log_probs=True
    )


def gradients(model, k):
    """[4, P] exact w_k(p) grad p."""
    rows = []
    for prompt in PROMPTS:
        p = next_token(model, prompt).exp()[::2].sum()
        slope = torch.autograd.grad(p, list(model.parameters()), allow_unused=True)
        parts = zip(slope, model.parameters(), strict=True)
        flat = torch.cat([(torch.zeros_like(q) if g is None else g).flatten() for g, q in parts])
        rows.append(float(passk_weight(p.detach(), k)) * flat)
    return torch.stack(rows)


def test_each_score_is_that_of_autograd_at_the_moved_model_times_its_ratio():
    then, now = tiny_model().double().eval(), tiny_model().double().eval()
    moved(now, 0.03)
    sample, seen = drawn_from(then, torch.Generator().manual_seed(0)), []
    fresh = refresher(then).run(lambda: sample, (), 0)
    again, _ = reweigh(fresh, replace_gram(refresher(now), seen), 0, 0.01)
    ratios = torch.zeros(4, N, dtype=torch.float64)
    expected, parameters = torch.zeros_like(seen[0]), list(now.parameters())
    mixed = (again.probe.num_correct > 0) & (again.probe.num_correct < N)
    assert mixed.sum() > 1
    right = torch.tensor(
        [[token[0] % 2 == 0 for token in sample[0].completion_ids[x * N : (x + 1) * N]] for x in range(4)]
    )
    for i, (token,) in enumerate(sample[0].completion_ids):
        x, y = divmod(i, N)
        log_p = next_token(now, PROMPTS[x])[token]
        ratios[x, y] = (log_p - next_token(then, PROMPTS[x])[token]).exp().detach()
        score = torch.autograd.grad(log_p, parameters, allow_unused=True)
        parts = zip(score, parameters, strict=True)
        flat = torch.cat([(torch.zeros_like(q) if g is None else g).flatten() for g, q in parts])
        expected[x if right[x, y] else 4 + x] += ratios[x, y] * flat * mixed[x]
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-6)  # the norms of the model are in float32
    wrong = torch.where(right, 0.0, ratios)
    pairs = (wrong.sum(1).square() - wrong.square().sum(1)) / 2
    torch.testing.assert_close(again.probe.misses[mixed, 1], (wrong.sum(1) / (N - 1))[mixed])
    torch.testing.assert_close(again.probe.misses[mixed, 2], (pairs / ((N - 1) * (N - 2) / 2))[mixed])


@pytest.mark.slow
def test_averaged_over_samples_it_is_the_exact_gradient_of_the_moved_model(monkeypatch):
    then, now = tiny_model().double().eval(), tiny_model().double().eval()
    moved(now, 0.03)
    generator, seen, draws = torch.Generator().manual_seed(0), [], 200
    gram = Refresher.gram
    monkeypatch.setattr(Refresher, "gram", lambda self, sums, kept: seen.append(sums) or gram(self, sums, kept))
    ks = torch.tensor([1, 3, 6])
    axis = torch.randn(3, gradients(now, 1).shape[1], dtype=torch.float64, generator=generator)
    sample = drawn_from(then, generator, draws)
    fresh = refresher(then, max_tokens=1000).run(lambda: sample, (), 0)
    again, share = reweigh(fresh, refresher(now, max_tokens=1000), 0, 0.01)
    assert 0.3 < share < 1
    exact = torch.stack([gradients(now, int(k)) @ axis.T for k in ks])
    off = {}
    for name, probe, sums in (("reused", again.probe, seen[1]), ("as if fresh", fresh.probe, seen[0])):
        found = (coefficients(probe, ks)[:, :, None] * (sums @ axis.T)).view(3, 2, draws, 4, 3).sum(1)
        off[name] = ((found.mean(1) - exact) / (found.std(1) / draws**0.5)).abs()
    assert off["reused"].square().mean() < 1.6, off["reused"]
    assert off["reused"].max() < 4
    assert off["as if fresh"].max() > 6, "what the ratios are for"


def test_fresh_samples_of_another_engine_are_reweighted_at_once():
    then, now = tiny_model().double().eval(), tiny_model().double().eval()
    moved(now, 0.03)
    rollouts, outcomes = drawn_from(then, torch.Generator().manual_seed(0), 2)
    with torch.no_grad():
        pairs = list(zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True))
        given, logs = ([next_token(model, p)[y].item() for p, (y,) in pairs] for model in (then, now))
    fresh = refresher(then).run(lambda: (rollouts, outcomes), (), 3)
    expected, share = reweigh(fresh, refresher(now), 3, 0.01)
    mine = lambda: (replace(rollouts, log_probs=given), outcomes)  # noqa: E731
    keeper = RolloutKeeper(1, 0.01)
    found = keeper.refresh(refresher(now), mine, (), 3)
    torch.testing.assert_close(found.probe.gram, expected.probe.gram, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.probe.misses, expected.probe.misses, rtol=1e-5, atol=1e-6)
    assert not found.probe.reused
    assert not load_again(found.probe).reused
    mixed = [x for x in range(8) if 0 < int(fresh.num_correct[x]) < N]
    ratios = torch.tensor([logs[i] - given[i] for x in mixed for i in range(x * N, x * N + N)])
    numbers = {"sampler_mismatch": float(ratios.square().mean().sqrt()), "sampler_effective_samples": share}
    assert keeper.metrics() == pytest.approx(numbers, rel=1e-5)
    clipped = coefficients(found.probe, torch.tensor([3]), cap=1.0)
    assert torch.equal(clipped, coefficients(fresh.probe, torch.tensor([3]), cap=1.0)), "a floor stays possible"
    twice = RolloutKeeper(2, 0.01)
    assert [twice.refresh(refresher(now), mine, (), 3).probe.reused for _ in range(3)] == [False, True, False]
    with pytest.raises(FailedRefresh, match=r"the sampler and the model disagree.* worth 0\.\d\d of their number"):
        RolloutKeeper(1, 0.99).refresh(refresher(now), mine, (), 3)


def load_again(probe):
    memory = Memory().with_refresh(probe, 3, 1)
    with tempfile.TemporaryDirectory() as folder:
        save_memory(memory, Path(folder))
        return load_memory(Path(folder)).history[0]


def test_of_an_unmoved_model_the_refresh_is_that_of_fresh_samples():
    model = tiny_model().double().eval()
    sample = drawn_from(model, torch.Generator().manual_seed(1))
    fresh = refresher(model).run(lambda: sample, ["a", "b", "c", "d"], 3)
    again, share = reweigh(fresh, refresher(model), 3, 0.9)
    assert share == 1.0
    torch.testing.assert_close(again.probe.gram, fresh.probe.gram, rtol=1e-9, atol=1e-12)
    assert again.probe.prompt_keys == ["a", "b", "c", "d"]
    assert again.probe.reused
    ks = torch.arange(1, 4)
    torch.testing.assert_close(coefficients(again.probe, ks), coefficients(fresh.probe, ks))


def test_the_ratios_of_an_unmoved_model_are_exactly_one_in_bf16_too():
    model = tiny_model().eval()
    sample, narrow = drawn_from(model, torch.Generator().manual_seed(1)), partial(torch.autocast, "cpu", torch.bfloat16)
    fresh = replace(refresher(model, "kronecker"), autocast=narrow).run(lambda: sample, (), 3)
    again, share = reweigh(fresh, replace(refresher(model, "kronecker"), autocast=narrow), 4, 0.9)
    assert share == 1.0
    assert all(torch.equal(batch.factors, torch.ones_like(batch.factors)) for batch in again.batches)
    _, share = reweigh(fresh, refresher(model, "kronecker"), 4, 0.01)
    assert share < 1.0, "the precision must not change between a sample and its reuse"


def direction(model, again):
    loss = pass1_loss(again, 1)
    total = sum(loss(model, batch) for batch in again.batches)
    return torch.autograd.grad(total, list(model.parameters()), allow_unused=True)


def test_the_protected_direction_weighs_each_sample_by_its_ratio():
    then, now = tiny_model().double().eval(), tiny_model().double().eval()
    moved(now, 0.05)
    sample = drawn_from(then, torch.Generator().manual_seed(2))
    fresh = refresher(then).run(lambda: sample, (), 3)
    seen = []
    again, _ = reweigh(fresh, replace_gram(refresher(now), seen), 3, 0.01)
    one = coefficients(again.probe, torch.tensor([1]))[0]
    expected = -(one[:, None] * seen[-1]).sum(0) / 4
    found = [g for g in direction(now, again) if g is not None]
    assert torch.cat([g.flatten() for g in found]).norm() == pytest.approx(float(expected.norm()), rel=1e-5)


def replace_gram(made, seen):
    class Seeing(Refresher):
        def gram(self, sums, kept):
            seen.append(sums)
            return super().gram(sums, kept)

    return Seeing(**vars(made))


def test_halved_batches_give_the_same_refresh():
    then, now = tiny_model().double().eval(), tiny_model().double().eval()
    moved(now, 0.05)
    sample = drawn_from(then, torch.Generator().manual_seed(3))
    fresh = refresher(then).run(lambda: sample, (), 3)
    whole, share = reweigh(fresh, refresher(now), 3, 0.01)
    small = _in_halves(_in_halves(_in_halves(fresh)))
    assert max(len(batch.slots) for batch in small.batches) < max(len(batch.slots) for batch in fresh.batches)
    pieces, same = reweigh(small, refresher(now), 3, 0.01)
    assert same == pytest.approx(share)
    torch.testing.assert_close(pieces.probe.gram, whole.probe.gram)
    torch.testing.assert_close(pieces.probe.misses, whole.probe.misses)


def test_a_sample_serves_its_refreshes_and_ends_early_below_the_effective_size():
    model = tiny_model().double().eval()
    generator, asked = torch.Generator().manual_seed(4), []

    def sample():
        asked.append(1)
        return drawn_from(model, generator)

    keeper = RolloutKeeper(3, 0.5)
    all_refreshes = [keeper.refresh(refresher(model), sample, (), i) for i in range(7)]
    assert [again.probe.reused for again in all_refreshes] == [False, True, True, False, True, True, False]
    assert len(asked) == 3
    assert keeper.metrics() == {"effective_samples": 1.0, "resampled_at": None}
    moved(model, 0.5)
    assert not keeper.refresh(refresher(model), sample, (), 7).probe.reused
    assert len(asked) == 4
    found = keeper.metrics()
    assert found["effective_samples"] == 1.0
    assert found["resampled_at"] < 0.5
    keeper.drop()
    assert not keeper.refresh(refresher(model), sample, (), 8).probe.reused


def test_memory_pools_each_sample_once(tmp_path):
    model = tiny_model().double().eval()
    generator, keeper, memory = torch.Generator().manual_seed(6), RolloutKeeper(2, 0.1), Memory()
    kinds, pooled = [], []
    for step in range(5):
        again = keeper.refresh(refresher(model), lambda: drawn_from(model, generator), (), step)
        memory = memory.with_refresh(again.probe, 3, step)
        kinds.append([probe.reused for probe in memory.history])
        pooled.append(len(memory.pooled(3)))
    assert kinds == [[False], [True], [True, False], [True, True], [True, True, False]]
    assert (memory.taken, pooled) == ((1, 3, 4), [1, 1, 2, 2, 2]), "the newest three refreshes and none before"
    save_memory(memory, tmp_path)
    back = load_memory(tmp_path)
    assert back.taken == memory.taken
    assert torch.equal(back.history[0].misses, memory.history[0].misses)
    assert back.history[2].misses is None


@pytest.mark.parametrize("allowed", [None, 0.05])
def test_no_verdict_comes_of_samples_that_have_been_seen(allowed):
    estimate = ConflictEstimate(8, "conflict", "", 0.95, 0.0, 64, 40, 1, cosine=-0.9)
    state, evidence, rule = DecisionState(), RunEvidence(), DecisionRule(patience=1, false_alarms=allowed)
    check = Check(3.0, 1.0, 40)
    for _ in range(20):
        state, evidence, verdict = decide(state, evidence, estimate, check, rule, fresh=False)
    assert (state, evidence, verdict.status) == (DecisionState(), RunEvidence(), "undetermined")
    for _ in range(9):
        state, evidence, verdict = decide(state, evidence, estimate, check, rule)
    assert verdict.status == "conflict"


def refreshes(folder):
    lines = [json.loads(line) for line in (Path(folder) / "passk_guard.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "refresh"]


@pytest.mark.parametrize("make", [tiny_lm_trainer, tiny_grpo_trainer])
def test_training_is_bit_for_bit_the_same(make, tmp_path):
    weights, rows, seen, _ = run(make, tmp_path / "without", False)
    settings = {"refresh_steps": 1, "resample_refreshes": 3, "min_effective_samples": 0.01, "probe_prompts": 4}
    guarded, guarded_rows, guarded_seen, _ = run(make, tmp_path / "with", True, **settings)
    found = refreshes(tmp_path / "with")
    assert ["pass_at_1" in row and row["pass_at_1"] is not None for row in found] == [True, False, False, True, False]
    assert [row["effective_samples"] == 1 for row in found] == [True, False, False, True, False]
    assert rows == guarded_rows
    assert seen == guarded_seen
    assert all(torch.equal(weights[name], guarded[name]) for name in weights)


@pytest.mark.parametrize("mitigation", ["off", "project"])
def test_a_resumed_run_is_the_uninterrupted_one(mitigation, tmp_path):
    settings = {"refresh_steps": 1, "resample_refreshes": 4, "min_effective_samples": 0.01, "probe_prompts": 4}
    settings |= {"mitigation": mitigation}

    def attempt(folder, resume=None):
        trainer = tiny_lm_trainer(folder, max_steps=7, learning_rate=1e-3, save_strategy="steps", save_steps=3)
        guard = guard_of(trainer, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return guard, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    whole, weights = attempt(tmp_path / "run")
    found = refreshes(tmp_path / "run")
    assert [row["pass_at_1"] is not None for row in found] == [True, False, False, True, False, False, True]
    resumed, again = attempt(tmp_path / "run", str(tmp_path / "run" / "checkpoint-3"))
    after = refreshes(tmp_path / "run")[7:]
    for row in (*found, *after):
        del row["time"], row["probe_seconds"], row["step_seconds"]
    assert after == found[3:]
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert resumed.memory.decision == whole.memory.decision
    assert resumed.memory.evidence == whole.memory.evidence
    assert len(whole.memory.evidence.checks) <= 3, "one check a sample at most"
