"""The hand-written loop: probing changes nothing, and each mitigation changes the step as stated."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from examples import custom_loop
from examples.custom_loop import Settings, Window, pass1_gradient, policy_loss, probe_gram, rollout, train
from examples.interference.model import make_model
from examples.interference.task import make_prompts
from examples.interference.tokenizer import make_tokenizer
from passk_guard import ScoreSketcher, estimate_change, passk_advantages
from passk_guard.change import Fused, estimate_level
from passk_guard.mitigation import FloorSolution, HoldMeasurement, HoldState

SMALL = Settings(steps=3, seed=1, k=3, prompts=4, samples=6, learning_rate=0.05)
SMALL = replace(SMALL, probe_prompts=10, refresh_steps=2, sketch_dim=256, test_prompts=20)
TOKENIZER = make_tokenizer()


def tiny():
    return make_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2)


def starts_with_a_letter(completions, **_):
    """Even a random model is right about half of the time."""
    return [float(text[:1].isalpha()) for text in completions]


def run(**changes):
    """Parameters after a run, its estimates and its lines."""
    model, lines = tiny(), []
    estimates = train(model, TOKENIZER, replace(SMALL, **changes), reward=starts_with_a_letter, report=lines.append)
    return list(model.parameters()), estimates, lines


def run_without_probe(*, floor=None, hold=(0.0,) * SMALL.steps):
    """The same training written again, with no call of the guard but for the advantages."""
    model, s = tiny(), SMALL
    generator = torch.Generator().manual_seed(s.seed)
    rows = make_prompts("train", s.steps * s.prompts, s.seed)
    for step in range(len(hold)):
        batch = rows[step * s.prompts : (step + 1) * s.prompts]
        samples = rollout(model, TOKENIZER, batch, s.samples, starts_with_a_letter, generator)
        loss = policy_loss(model, samples, passk_advantages(samples.correct, s.k, floor=floor, hold=hold[step]))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.sub_(g, alpha=s.learning_rate)
    return list(model.parameters())


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("mitigation", ["off", "hold", "reweight", "project"])
def test_runs_and_reports_every_refresh(mitigation):
    state = torch.get_rng_state()
    parameters, estimates, lines = run(mitigation=mitigation)
    assert len(estimates) == 2
    assert [e.num_refreshes for e in estimates] == [1, 2]
    assert all(p.isfinite().all() for p in parameters)
    assert [line[:8] for line in lines] == ["step   0", "step   2", "step   3"]
    assert all(("floor" in line) == (mitigation == "reweight") for line in lines[:-1])
    assert all(("lambda" in line) == (mitigation == "hold") for line in lines[:-1])
    assert all(("coefficient" in line) == (mitigation == "project") for line in lines[:-1])
    assert all(("cos" in line) for line in lines[:-1])
    assert torch.equal(state, torch.get_rng_state())


def test_observing_leaves_the_run_bit_for_bit():
    watched, alone = run()[0], run_without_probe()
    assert same(watched, alone)
    assert not same(watched, list(tiny().parameters()))


def test_reweight_trains_with_the_floor_solved_from_the_probe(monkeypatch):
    asked = []

    def solve(probes, k, *, gamma, largest):
        asked.append((len(probes), k, gamma, largest))
        return FloorSolution("solved", "", 0.7, 0.0)

    monkeypatch.setattr(custom_loop, "solve_floor", solve)
    reweighted = run(mitigation="reweight", gamma=0.3, largest_floor=0.9)[0]
    assert asked == [(1, 3, 0.3, 0.9), (2, 3, 0.3, 0.9)]
    assert same(reweighted, run_without_probe(floor=0.7))
    assert not same(reweighted, run_without_probe())


def test_hold_trains_with_the_multiplier_and_measures_what_it_did(monkeypatch):
    told = []

    class Controller:
        def begin(self):
            return HoldState(0.7, 0.7)

        def step(self, state, measured):
            told.append((state.multiplier, measured))
            return HoldState(0.2, 0.2)

    monkeypatch.setattr(custom_loop, "HoldController", Controller)
    assert same(run(mitigation="hold")[0], run_without_probe(hold=(0.7, 0.7, 0.2)))
    model, seed = tiny(), SMALL.seed * 1_000_003
    for p, after in zip(model.parameters(), run_without_probe(hold=(0.7, 0.7)), strict=True):
        p.data.copy_(after)
    prompts, generator = make_prompts("probe", SMALL.probe_prompts, seed), torch.Generator().manual_seed(seed)
    sample = rollout(tiny(), TOKENIZER, prompts, SMALL.samples, starts_with_a_letter, generator)
    change = estimate_change(Window.opened(tiny(), sample).log_ratios(model), sample.correct, SMALL.k)
    fused = Fused().with_level(estimate_level(sample.correct, SMALL.k)).with_window(change)
    assert told == [(0.7, HoldMeasurement.of(fused.pass_at_1, change, SMALL.refresh_steps))]


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors]).double()


def test_project_keeps_the_constraint_and_the_step_is_the_projected_gradient(monkeypatch):
    projected, before = [], []
    project, step = custom_loop.project_gradient, torch.optim.SGD.step

    def watch(gradients, protected, gamma):
        original = flat(gradients)
        result = project(gradients, protected, gamma)
        projected.append((original, flat(gradients), flat(protected), result))
        return result

    def watch_step(optimizer, *args):
        parameters = optimizer.param_groups[0]["params"]
        old = flat(parameters)
        out = step(optimizer, *args)
        before.append((old - flat(parameters)) / SMALL.learning_rate)
        return out

    monkeypatch.setattr(custom_loop, "project_gradient", watch)
    monkeypatch.setattr(torch.optim.SGD, "step", watch_step)
    gamma = 0.9  # on a random model the two gradients nearly agree, so that a lower constraint would hold
    run(mitigation="project", gamma=gamma)
    assert len(projected) == SMALL.steps
    assert any(result.coefficient > 0 for *_, result in projected)
    for (original, after, protected, _), taken in zip(projected, before, strict=True):
        cosine = after @ protected / after.norm() / protected.norm()
        assert cosine >= gamma / math.sqrt(1 + gamma**2) - 1e-6
        assert after @ protected >= gamma * original.norm() * protected.norm() * (1 - 1e-6)
        assert torch.allclose(taken, after, rtol=1e-3, atol=1e-5)
    assert torch.equal(projected[0][2], projected[1][2]), "the direction stays until the next refresh"
    assert not torch.equal(projected[1][2], projected[2][2])


def samples_of(model, prompts=3, samples=4, seed=0):
    rows = make_prompts("probe", prompts, seed)
    return rollout(model, TOKENIZER, rows, samples, starts_with_a_letter, torch.Generator().manual_seed(seed))


def score(model, samples, i):
    """grad log pi of sample i, one token after the other, without padding."""
    length = int(samples.attention[i].sum())
    ids = samples.ids[i, :length]
    logits = model(input_ids=ids[None]).logits[0].double()
    first = length - int(samples.completion[i].sum())
    log_pi = sum(logits[t - 1].log_softmax(-1)[ids[t]] for t in range(first, length))
    return flat(torch.autograd.grad(log_pi, list(model.parameters())))


def test_rollout_ends_at_end_of_sequence_and_masks_the_rest():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[TOKENIZER.eos_token_id] *= 3  # so that some end early
    samples = samples_of(model, prompts=8, samples=8)
    eos, pad, lengths = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id, set()
    for ids, completion, attention in zip(samples.ids, samples.completion, samples.attention, strict=True):
        assert completion[:7].sum() == 0
        answer = ids[7:].tolist()
        end = answer.index(eos) + 1 if eos in answer else len(answer)
        assert completion[7:].tolist() == [1] * end + [0] * (5 - end)
        assert attention.tolist() == [1] * (7 + end) + [0] * (5 - end)
        assert set(answer[end:]) <= {pad}
        lengths.add(end)
    assert len(lengths) > 1


def test_the_protected_gradient_is_leave_one_out_on_the_probe():
    model = tiny()
    samples = samples_of(model)
    m, n = samples.correct.shape
    expected = 0
    for x in range(m):
        for i in range(n):
            others = (samples.correct[x].sum() - samples.correct[x, i]) / (n - 1)
            expected = expected - (samples.correct[x, i] - others) * score(model, samples, x * n + i) / (m * n)
    found = flat(pass1_gradient(model, samples, list(model.parameters())))
    assert expected.norm() > 0
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_the_gram_matrix_is_of_sums_over_right_and_wrong_samples():
    model = tiny()
    samples = samples_of(model)
    m, n = samples.correct.shape
    sums = torch.zeros(2 * m, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for i in range(m * n):
        x = i // n
        sums[x if samples.correct[x, i % n] == 1 else m + x] += score(model, samples, i)
    keys = ["a", "b", "c"]
    probe = probe_gram(ScoreSketcher(model, method="identity"), samples, keys, seed=0)
    assert torch.allclose(probe.gram, sums @ sums.T, rtol=1e-3, atol=1e-4)
    assert probe.num_samples.tolist() == [n] * m
    assert probe.num_correct.tolist() == samples.correct.sum(1).tolist()
    assert list(probe.prompt_keys) == keys


def test_command_line_has_every_mitigation(monkeypatch, tmp_path, capsys):
    model = tiny()
    model.save_pretrained(tmp_path / "seed0")
    TOKENIZER.save_pretrained(tmp_path / "seed0")
    arguments = ["custom_loop", "--steps", "1", "--mitigation", "reweight", "--cache", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    custom_loop.main()
    out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(out) == 2
    assert "floor" in out[0]
    assert "the end" in out[1]
