"""The solved floor: against loops over samples, exact populations and repeated draws."""

import itertools
import math

import pytest
import torch

from passk_guard import GuardError, ProbeGram, passk_advantages
from passk_guard.mitigation import FloorSolution, FloorState, smooth_floor, solve_floor
from tests.helpers.populations import draw, population

K, N = 4, 8


def samples(seed, m=12, n=N, dim=6):
    """Correct flags [m, n] and score vectors [m, n, dim]; hard prompts pull against the rest."""
    generator = torch.Generator().manual_seed(seed)
    rate = torch.linspace(0.05, 0.95, m)[:, None]
    correct = (torch.rand(m, n, generator=generator) < rate).double()
    side = torch.where(rate < 0.35, -1.0, 1.0).double()[..., None]
    noise = torch.randn(m, n, dim, generator=generator, dtype=torch.float64)
    axis = torch.eye(dim, dtype=torch.float64)[0]
    return correct, 0.1 * noise + (correct - correct.mean(1, keepdim=True))[..., None] * side * axis * 2


def gram_of(correct, scores):
    sums = torch.cat([(correct[..., None] * scores).sum(1), ((1 - correct)[..., None] * scores).sum(1)])
    return ProbeGram(sums @ sums.T, torch.full((len(correct),), correct.shape[1]), correct.sum(1).long())


def constraint_by_loops(parts, floor, gamma, cap=None):
    """U_phi1 - gamma sqrt(U_11 U_phiphi), in units of U_11, from the samples themselves, pair by pair."""
    totals = [0.0, 0.0, 0.0]
    for correct, scores in parts:
        one = (passk_advantages(correct, 1)[..., None] * scores).mean(1)
        many = (passk_advantages(correct, K, floor=floor, cap=cap)[..., None] * scores).mean(1)
        pairs = list(itertools.permutations(range(len(correct)), 2))
        for i, (left, right) in enumerate(((many, one), (one, one), (many, many))):
            totals[i] += sum(float(left[a] @ right[b]) for a, b in pairs) / len(pairs)
    return (totals[0] - gamma * math.sqrt(totals[1] * max(0.0, totals[2]))) / totals[1]


@pytest.mark.parametrize("gamma", [0.0, 0.2])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_floor_is_the_smallest_that_reaches_gamma(gamma, cap, seed):
    parts = [samples(2 * seed), samples(2 * seed + 1)]
    solution = solve_floor([gram_of(*part) for part in parts], K, gamma=gamma, largest=2.0, cap=cap)
    assert solution.status == "solved", "the fixture must need a floor"
    at = constraint_by_loops(parts, solution.floor, gamma, cap)
    assert at == pytest.approx(0.0, abs=1e-9 if gamma == 0 else 2e-3)
    assert max(constraint_by_loops(parts, share * solution.floor, gamma, cap) for share in (0.0, 0.3, 0.6, 0.9)) < -0.01


@pytest.mark.parametrize("cosine", [-0.5, -0.2])
def test_the_floor_converges_to_that_of_the_population(cosine):
    pop = population(cosine)
    p = pop.pass_rate
    others = torch.arange(16, dtype=torch.float64)
    binomial = torch.tensor([[math.comb(15, int(c)) * q**c * (1 - q) ** (15 - c) for c in others] for q in p.tolist()])
    weight = torch.tensor([8 * math.comb(15 - int(c), 7) / math.comb(15, 7) for c in others])
    g = (pop.share * p * (1 - p))[:, None] * pop.means

    def inner(floor):
        expected = (binomial * weight.clamp(min=floor)).sum(1)  # E[f(W)] of each kind of prompt
        return float((expected[:, None] * g).sum(0) @ g.sum(0))

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if inner(middle) < 0 else (low, middle)
    generator = torch.Generator().manual_seed(0)
    found = [solve_floor([draw(pop, 256, 16, generator) for _ in range(4)], 8) for _ in range(8)]
    floors = torch.tensor([s.floor for s in found])
    assert float(floors.mean()) == pytest.approx(low, abs=4 * float(floors.std()) / math.sqrt(8))
    assert float(floors.std()) < 0.25 * low + 0.02


def test_the_error_is_what_repetition_shows():
    generator = torch.Generator().manual_seed(1)
    pop = population(-0.5)
    found = [solve_floor([draw(pop, 64, 16, generator) for _ in range(3)], 8) for _ in range(120)]
    spread = float(torch.tensor([s.floor for s in found]).std())
    stated = float(torch.tensor([s.standard_error for s in found]).square().mean().sqrt())
    assert 0.75 < stated / spread < 1.35


def test_no_conflict_needs_no_floor():
    generator = torch.Generator().manual_seed(0)
    solution = solve_floor([draw(population(0.5), 256, 16, generator)], 8)
    assert (solution.status, solution.floor) == ("not_needed", 0.0)


def test_no_floor_suffices_is_an_answer():
    parts = [samples(0)]
    solution = solve_floor([gram_of(*part) for part in parts], K, gamma=0.9, largest=0.05)
    assert solution.status == "no_floor_suffices"
    assert solution.floor is None
    assert "0.05" in solution.reason


def test_a_probe_without_signal_is_undetermined():
    correct, scores = samples(0)
    for silent in (torch.zeros_like(correct), torch.ones_like(correct)):
        solution = solve_floor([gram_of(silent, scores)], K)
        assert (solution.status, solution.floor) == ("undetermined", None)
        assert "pass@1" in solution.reason
    few = solve_floor([gram_of(correct[5:7], scores[5:7])], K)
    assert few.status == "undetermined"


def test_the_bound_of_the_theory_is_the_ratio_of_agreements():
    correct, scores = samples(3)
    g = (passk_advantages(correct, 1)[..., None] * scores).mean(1)
    m = len(g)
    agreement = torch.stack([sum(g[x] @ g[y] for y in range(m) if y != x) / (m - 1) for x in range(m)])
    expected = float(agreement.clamp(min=0).sum() / (-agreement).clamp(min=0).sum())
    assert solve_floor([gram_of(correct, scores)], K).weight_ratio_bound == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-10, 1e15])
def test_neither_scale_nor_order_matters(scale):
    probe = gram_of(*samples(0))
    reference = solve_floor([probe], K, gamma=0.1, largest=2.0)
    m = len(probe.num_samples)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(0))
    both = torch.cat([order, order + m])
    moved = ProbeGram(scale * probe.gram[both][:, both], probe.num_samples[order], probe.num_correct[order])
    found = solve_floor([moved], K, gamma=0.1, largest=2.0)
    assert found.floor == pytest.approx(reference.floor, rel=1e-7)
    assert found.standard_error == pytest.approx(reference.standard_error, rel=1e-6)


def test_smoothing_weighs_answers_by_their_precision():
    def answer(floor, error):
        return FloorSolution("solved", floor=floor, standard_error=error)

    first = smooth_floor(FloorState(), answer(0.6, 0.2), 0.8)
    assert first.floor == pytest.approx(0.8)  # raised by its error
    sure, unsure = (smooth_floor(first, answer(0.0, error), 0.8, caution=0.0) for error in (0.05, 1.0))
    assert sure.floor < unsure.floor < 0.8
    # By hand: weights 0.8 / (0.2^2 + 0.2^2) and 1 / (1.0^2 + 0.2^2).
    old, new = 0.8 / 0.08, 1 / 1.04
    assert unsure.floor == pytest.approx(0.8 * old / (old + new))
    assert smooth_floor(first, answer(0.1, 0.3), 0.0).floor == pytest.approx(0.4)
    assert smooth_floor(first, FloorSolution("undetermined"), 0.8) == first
    assert smooth_floor(first, FloorSolution("no_floor_suffices"), 0.8) == first


def test_smoothing_averages_the_noise_away():
    generator = torch.Generator().manual_seed(0)
    state, floors = FloorState(), []
    for noise in (0.3 * torch.randn(400, generator=generator, dtype=torch.float64)).tolist():
        state = smooth_floor(state, FloorSolution("solved", floor=0.5 + noise, standard_error=0.3), 0.8, caution=0.0)
        floors.append(state.floor)
    tail = torch.tensor(floors[50:])
    assert float(tail.mean()) == pytest.approx(0.5, abs=0.05)
    # Of an exponential average with weight a on the past: sqrt((1 - a) / (1 + a)) = 1/3 of the noise.
    assert float(tail.std()) == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 1.0}, "gamma"),
        ({"gamma": -0.1}, "gamma"),
        ({"largest": 0.0}, "largest"),
        ({"largest": 5.0}, "largest"),
        ({"cap": 0.0}, "cap"),
    ],
)
def test_misuse_is_refused(arguments, message):
    with pytest.raises(GuardError, match=message):
        solve_floor([gram_of(*samples(0))], K, **arguments)
    with pytest.raises(GuardError, match="none"):
        solve_floor([], K)
    with pytest.raises(GuardError, match="average"):
        smooth_floor(FloorState(), FloorSolution("solved", floor=1.0), 1.0)
