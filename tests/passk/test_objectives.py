"""Published prompt weightings against their own definitions: enumerated outcomes, all subsets, TRL's trainers."""

import itertools
import math
from importlib.metadata import version

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passk_guard import GuardError, passk_advantages
from passk_guard.passk import (
    Weighting,
    dr_grpo,
    grpo,
    maxrl,
    mixture,
    named_weighting,
    passk,
    passk_training,
    rloo,
    rs_grpo,
    surrogate,
    tabulated,
    verl_grpo_passk,
)
from tests.helpers.tiny import tiny_grpo_trainer, tiny_rloo_trainer

RATES = torch.tensor([0.0, 1e-6, 0.03, 0.3, 0.5, 0.8, 0.97, 1.0], dtype=torch.float64)
INSIDE = RATES[2:-1]
SPECS = [
    "grpo",
    "grpo:epsilon=1e-06",
    "dr_grpo",
    "rloo",
    "maxrl",
    "passk:1",
    "passk:3",
    "passk:3,floor=0.5",
    "passk:2,floor=0.25,cap=1.5",
    "mixture:k=3,share=0.3",
    "passk_training:1",
    "passk_training:2",
    "passk_training:3",
    "rs_grpo:beta=2",
    "rs_grpo:beta=-1.5",
    "verl_grpo_passk",
]
LASTING = [spec for spec in SPECS if spec != "verl_grpo_passk"]  # whose weight does not vanish as n grows


def by_subsets(rewards, k):
    """Pass@k Training as its bootstrap sampler means it: every k-subset once, normalised over the subsets."""
    subsets = list(itertools.combinations(range(len(rewards)), k))
    reward = torch.tensor([max(rewards[i] for i in s) for s in subsets], dtype=torch.float64)
    deviation = reward.std(correction=0)
    if deviation == 0:
        return torch.zeros(len(rewards), dtype=torch.float64)
    normal = (reward - reward.mean()) / deviation
    return torch.stack([normal[[i in s for s in subsets]].mean() for i in range(len(rewards))])


def published(spec, r):
    """Advantages [n] of one group of rewards r, each written the way its paper or its code has it."""
    name, _, rest = spec.partition(":")
    n = len(r)
    if name == "grpo":
        return (r - r.mean()) / (r.std() + (1e-6 if rest else 1e-4))
    if name == "dr_grpo":
        return r - r.mean()
    if name == "rloo":
        return torch.stack([r[i] - (r.sum() - r[i]) / (n - 1) for i in range(n)])
    if name == "maxrl":
        return (r - r.mean()) / r.mean() if r.any() else torch.zeros_like(r)
    if name == "passk":
        k, *bounds = rest.split(",")
        return passk_advantages(r[None], int(k), **{b.split("=")[0]: float(b.split("=")[1]) for b in bounds})[0]
    if name == "mixture":
        return 0.3 * passk_advantages(r[None], 1)[0] + 0.7 * passk_advantages(r[None], 3)[0]
    if name == "verl_grpo_passk":
        first, second = r.sort(descending=True).values[:2]
        return torch.zeros_like(r).index_fill(0, r.argmax(), float(first - second))
    if name == "passk_training":
        return by_subsets(r.tolist(), int(rest))
    beta = float(rest.removeprefix("beta="))
    risen = (beta * r).exp()
    return (risen / risen.mean() - 1) / beta


def groups(n):
    return [torch.tensor(r, dtype=torch.float64) for r in itertools.product([0.0, 1.0], repeat=n)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [3, 4, 6])
def test_coefficients_are_the_published_advantages_over_n(spec, n):
    for r in groups(n):
        positive, negative = named_weighting(spec).coefficients(torch.tensor(n), r.sum())
        found = torch.where(r == 1, positive, negative) * n
        assert torch.allclose(found, published(spec, r), rtol=1e-12, atol=1e-14), (spec, r)


def enumerated(advantages):
    """grad p of three softmax policies over 4 answers, two of them right, with the expected gradient estimate of every
    draw of 4 samples: scores e_y - pi."""
    n, right = 4, torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)
    for logits in ([0.0, 0.3, -0.2, -1.0], [-4.0, 1.0, 0.5, -3.0], [2.0, -1.0, 0.0, 3.0]):
        theta = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
        p = (theta.softmax(0) * right).sum()
        (grad_p,) = torch.autograd.grad(p, theta)
        policy = theta.detach().softmax(0)
        score = torch.eye(4, dtype=torch.float64) - policy
        expected = torch.zeros(4, dtype=torch.float64)
        for draw in itertools.product(range(4), repeat=n):
            expected += policy[list(draw)].prod() * (advantages(right[list(draw)]) @ score[list(draw)]) / n
        yield p.detach(), grad_p, expected


@pytest.mark.parametrize("spec", SPECS)
def test_expected_gradient_of_a_softmax_policy_is_the_weight_times_grad_p(spec):
    for p, grad_p, expected in enumerated(lambda r: published(spec, r)):
        weight = named_weighting(spec).effective_weight(p, 4)
        assert torch.allclose(expected, weight * grad_p, rtol=1e-9, atol=1e-15), spec


def test_a_weight_of_your_own():
    """F = p + p^3/3: its plug-in advantages have the weight that enumeration finds, and F' as n grows."""

    def derivative(p):
        return 1 + p**2

    mine = surrogate(derivative)
    for p, grad_p, expected in enumerated(lambda r: derivative(r.mean()) * (r - r.mean())):
        assert torch.allclose(expected, mine.effective_weight(p, 4) * grad_p, rtol=1e-9, atol=1e-15)
    assert torch.allclose(mine.effective_weight(INSIDE, 4000), derivative(INSIDE), rtol=1e-3)


def test_the_advantages_of_your_own_trainer():
    """A trainer that clips GRPO's advantages, and rewards a group that is all right; as a function and as its table."""

    def trainer(r):
        return ((r - r.mean()) / (r.std() + 1e-4)).clamp(max=1.0) + 0.25 * (r.mean() == 1)

    mine = tabulated(trainer, 4)
    for p, grad_p, expected in enumerated(trainer):
        assert torch.allclose(expected, mine.effective_weight(p, 4) * grad_p, rtol=1e-9, atol=1e-15)
    rows = [(trainer((torch.arange(4) < c).double())[[0, -1]]).tolist() for c in range(5)]
    again = tabulated(torch.tensor(rows, dtype=torch.float64), 4)
    counts = torch.arange(5)
    for one, other in zip(*(w.coefficients(torch.full((5,), 4), counts) for w in (mine, again)), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(mine.population_weight(RATES), mine.effective_weight(RATES, 4))
    assert mine.coefficients(torch.tensor([0, 4]), torch.tensor([0, 4]))[0].tolist() == [0, 0.0625]


@pytest.mark.parametrize("spec", LASTING)
def test_effective_weight_tends_to_the_population_weight(spec):
    """The bias is O(1/n): four times the samples leave a quarter of it, or (nearly) nothing to begin with."""
    weighting = named_weighting(spec)
    limit = weighting.population_weight(INSIDE)
    bias = [(weighting.effective_weight(INSIDE, n) / limit - 1).abs() for n in (2000, 8000)]
    assert bool((bias[1] < 0.05).all())
    settled = bias[0] < 1e-8
    kink = torch.zeros_like(settled)
    if "floor" in spec or "cap" in spec:  # within the sampling noise of a bound, O(1/sqrt(n))
        assert bool((bias[1] <= bias[0] + 1e-12).all())
        kink = torch.ones_like(settled)
    ratio = bias[1] / bias[0]
    assert bool((settled | kink | ((ratio > 0.15) & (ratio < 0.3))).all()), ratio


@pytest.mark.parametrize("n", [2, 3, 8, 40])
def test_closed_forms_at_finite_n(n):
    q = 1 - RATES
    ones = torch.ones_like(RATES)
    assert torch.allclose(rloo().effective_weight(RATES, n), ones, rtol=1e-12)
    assert torch.allclose(dr_grpo().effective_weight(RATES, n), ones * (n - 1) / n, rtol=1e-12)
    series = sum(q**j for j in range(n - 1))  # (1 - (1-p)^(n-1)) / p
    assert torch.allclose(maxrl().effective_weight(RATES, n), series, rtol=1e-11)
    for k in {1, 2, n}:
        assert torch.allclose(passk(k).effective_weight(RATES, n), k * q ** (k - 1), rtol=1e-10, atol=1e-13)
        ends = passk_training(k).effective_weight(torch.tensor([0.0]), n)
        assert math.isclose(float(ends), math.sqrt((n - k) / k), rel_tol=1e-12, abs_tol=1e-12)
    assert torch.allclose(verl_grpo_passk().effective_weight(RATES, n), q ** (n - 1), rtol=1e-10)
    ends = grpo().effective_weight(torch.tensor([0.0, 1.0]), n)
    assert torch.allclose(ends, torch.full((2,), (1 - 1 / n) / (n**-0.5 + 1e-4), dtype=torch.float64))


def test_population_weights():
    p, q = RATES, 1 - RATES
    assert torch.allclose(grpo(1e-12).population_weight(INSIDE), 1 / (INSIDE * (1 - INSIDE)).sqrt())
    assert torch.equal(maxrl().population_weight(p), 1 / p)
    assert torch.allclose(mixture(4, 0.25).population_weight(p), 0.25 + 0.75 * 4 * q**3)
    assert verl_grpo_passk().population_weight(p).tolist() == [1] + [0] * (len(p) - 1)
    assert torch.allclose(passk(4, floor=0.5, cap=2).population_weight(p), (4 * q**3).clamp(0.5, 2))
    sigma = ((1 - q**4) * q**4).sqrt()
    inside = (sigma > 0) & (p > 1e-3)
    assert torch.allclose(passk_training(4).population_weight(p)[inside], (q**3 / sigma)[inside])
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert [passk_training(k).population_weight(ends).tolist() for k in (1, 2, 3)] == [
        [math.inf, math.inf],
        [math.inf, 1.0],
        [math.inf, 0.0],
    ]
    rise = math.exp(2) - 1
    assert torch.allclose(rs_grpo(2).population_weight(p), rise / (2 * (1 + p * rise)))


@pytest.mark.parametrize("n", [2, 5, 16])
def test_objectives_that_are_limits_of_each_other(n):
    counts = torch.arange(n + 1)
    for group in (torch.full_like(counts, n), torch.zeros_like(counts)):
        seen = counts.clamp(max=group)
        for whole, one in zip(
            passk(n).coefficients(group, seen), verl_grpo_passk().coefficients(group, seen), strict=True
        ):
            assert torch.allclose(whole, n * one, rtol=1e-12), "verl's is pass@n, whatever k was meant"
    for share, k in ((1.0, 1), (0.0, n)):
        assert torch.allclose(mixture(n, share).effective_weight(RATES, n), passk(k).effective_weight(RATES, n))
    assert torch.allclose(rs_grpo(1e-9).effective_weight(RATES, n), dr_grpo().effective_weight(RATES, n), rtol=1e-8)
    assert torch.allclose(600 * rs_grpo(600.0).effective_weight(RATES, n), maxrl().effective_weight(RATES, n))
    assert torch.allclose(
        passk_training(1).effective_weight(RATES, n),
        grpo(1e-13).effective_weight(RATES, n) * math.sqrt(n / (n - 1)),  # the same, with the population's deviation
    )


@pytest.mark.parametrize(
    ("make", "args", "weighting"),
    [
        (tiny_grpo_trainer, {}, grpo()),
        (tiny_grpo_trainer, {"scale_rewards": "none"}, dr_grpo()),
        (tiny_rloo_trainer, {}, rloo()),
    ],
)
def test_trl_trainers_compute_these_advantages(make, args, weighting, tmp_path):
    trainer = make(tmp_path, **args)
    nan = float("nan")
    batches = [[1.0, 0, 0, 0, 1, 1, 0, 1], [0.0, 0, 0, 0, 1, 1, 1, 1]]
    if not version("trl").startswith("1.0."):  # which takes a missing reward for 0
        batches.append([1.0, 0, 0, nan, 1, nan, 0, nan])
    for rewards in batches:
        trainer._calculate_rewards = lambda *_, rewards=rewards, **__: torch.tensor(rewards)[:, None]
        found = trainer._generate_and_score_completions([{"prompt": f"{i // 4}+1=", "answer": "2"} for i in range(8)])
        r = torch.tensor(rewards, dtype=torch.float64).view(2, 4)
        n, c = (~r.isnan()).sum(1), r.nansum(1)
        positive, negative = weighting.coefficients(n, c)
        expected = (torch.where(r == 1, positive[:, None], negative[:, None]) * n[:, None]).where(~r.isnan(), 0.0)
        assert torch.allclose(found["advantages"].double().view(2, 4), expected, atol=1e-5)


@pytest.mark.parametrize("spec", LASTING)
def test_empty_failed_and_solved_prompts(spec):
    n, c = torch.tensor([0, 5, 5, 5]), torch.tensor([0, 0, 5, 2])
    positive, negative = named_weighting(spec).coefficients(n, c)
    assert positive.dtype == negative.dtype == torch.float64
    assert not positive[:2].any()
    assert not negative[[0, 2]].any()
    assert not negative[1].any(), "no objective here pushes anywhere when all samples fail"
    assert not positive[2].any(), "nor when all are right"
    assert float(positive[3]) > 0 > float(negative[3])


@given(st.sampled_from(SPECS), st.integers(3, 40), st.floats(0, 1))
def test_weights_are_finite_and_never_negative(spec, n, p):
    weighting = named_weighting(spec)
    weight = weighting.effective_weight(torch.tensor(p, dtype=torch.float64), n)
    assert 0 <= float(weight) < math.inf
    assert float(weighting.population_weight(torch.tensor(p, dtype=torch.float64))) >= 0
    counts = torch.arange(n + 1)
    for alpha, sign in zip(weighting.coefficients(torch.full_like(counts, n), counts), (1, -1), strict=True):
        assert bool(alpha.isfinite().all())
        assert bool((sign * alpha >= 0).all())


def test_large_groups_keep_their_digits():
    positive, negative = passk_training(500).coefficients(torch.tensor([2000, 2000]), torch.tensor([1, 1500]))
    assert bool((positive.isfinite() & negative.isfinite()).all())
    for n, c, k in ((100_000, 40, 500), (100, 60, 20)):  # 1 - pass@k is 0.8 and 3e-10
        positive, _ = passk_training(k).coefficients(torch.tensor(n), torch.tensor(c))
        miss = math.comb(n - c, k) / math.comb(n, k)
        assert math.isclose(float(positive) * n, math.sqrt(miss / (1 - miss)), rel_tol=1e-9)


def test_a_custom_weighting():
    """Reward +1 and -1 without a baseline: S+ and S- still vanish where there is nothing to sum."""
    signs = Weighting("signs", lambda p: 2 * torch.ones_like(p), lambda n, c: (n / n + 0 * c, -n / n + 0 * c), 1)
    positive, negative = signs.coefficients(torch.tensor([0, 4, 4, 4]), torch.tensor([0, 0, 1, 4]))
    assert positive.tolist() == [0, 0, 0.25, 0.25]
    assert negative.tolist() == [0, -0.25, -0.25, 0]
    assert torch.allclose(signs.effective_weight(RATES, 1), signs.population_weight(RATES))


@pytest.mark.parametrize("spec", SPECS)
def test_names_read_back(spec):
    assert named_weighting(spec).name == spec


def test_first_parameter_needs_no_key():
    assert named_weighting("rs_grpo:2").name == "rs_grpo:beta=2"
    assert named_weighting(" passk : k=8, cap=2 ").name == "passk:8,cap=2"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: named_weighting("ppo"), "grpo[:epsilon=E], dr_grpo, rloo, maxrl, passk:K"),
        (lambda: named_weighting(8), "found 8"),
        (lambda: named_weighting("passk"), "missing a required argument: 'k'"),
        (lambda: named_weighting("rs_grpo"), "missing a required argument: 'beta'"),
        (lambda: named_weighting("passk:eight"), "'eight' is not a whole number"),
        (lambda: named_weighting("passk:8,0.5"), "parameter '0.5' is unknown"),
        (lambda: named_weighting("passk:8,k=4"), "parameter 'k' is given twice"),
        (lambda: named_weighting("rloo:2"), "parameter '2' is unknown"),
        (lambda: named_weighting("rs_grpo:beta=two"), "'two' is not a number"),
        (lambda: named_weighting("rs_grpo:beta=nan"), "`beta` to be a finite number"),
        (lambda: rs_grpo(0), "other than 0"),
        (lambda: rs_grpo(-701.0), "found -701"),
        (lambda: grpo(0.0), "`epsilon` > 0"),
        (lambda: passk(0), "whole number >= 1; found 0"),
        (lambda: passk(True), "found True"),
        (lambda: passk_training(2.0), "found 2.0"),
        (lambda: passk(2, floor=-0.1), "`floor` to be a finite number >= 0"),
        (lambda: passk(2, cap=math.inf), "`cap` to be a finite number"),
        (lambda: passk(2, floor=2.0, cap=1.0), "`floor` <= `cap`"),
        (lambda: mixture(2, 1.1), "`share` in [0, 1], the part of pass@1; found 1.1"),
        (lambda: named_weighting("mixture:8"), "missing a required argument: 'share'"),
        (lambda: tabulated(torch.zeros(4, 2), 4), "[5, 2] of finite numbers for num_samples=4; found shape (4, 2)"),
        (lambda: tabulated(torch.full((5, 2), math.nan), 4), "found values that are not finite"),
        (lambda: tabulated(lambda r: r[:2], 4), "to return [4] for a group of 4; found (2,)"),
        (lambda: tabulated(lambda r: torch.arange(4.0), 4), "to depend on the reward alone"),
        (lambda: tabulated(lambda r: r, 4).effective_weight(torch.tensor(0.5), 8), "Expected groups of 4 samples"),
        (lambda: tabulated(lambda r: r, 4).effective_weight(torch.tensor(0.5), 3), "`num_samples` >= 4"),
        (lambda: grpo().coefficients(torch.tensor([4, 1]), torch.tensor([1, 1])), "`num_samples` >= 2 for 'grpo'"),
        (lambda: passk(8).coefficients(torch.tensor([0, 4]), torch.tensor([0, 1])), "found num_samples=4"),
        (lambda: passk_training(8).effective_weight(torch.tensor(0.5), 7), "`num_samples` >= 8"),
        (lambda: maxrl().effective_weight(torch.tensor(0.5), 0), "`num_samples` >= 2"),
        (lambda: rloo().coefficients(torch.tensor([4]), torch.tensor([5])), "`num_correct`"),
        (lambda: rloo().coefficients(torch.tensor([4.0]), torch.tensor([math.nan])), "`num_correct`"),
        (lambda: rloo().effective_weight(torch.tensor([0.5, 1.1]), 4), "`pass_rate` in [0, 1]"),
    ],
)
def test_misuse_says_what_to_change(call, words):
    with pytest.raises(GuardError) as error:
        call()
    assert words in str(error.value)


@pytest.mark.parametrize("spec", SPECS)
def test_groups_of_more_samples_have_the_weight_of_their_size(spec):
    whole, (n, c) = named_weighting(spec), torch.tensor([[9.0] * 10, list(range(10))], dtype=torch.float64)
    grouped = whole.in_groups_of(5)
    torch.testing.assert_close(grouped.effective_weight(RATES, 9), whole.effective_weight(RATES, 5), rtol=1e-9, atol=0)
    assert torch.equal(grouped.effective_weight(RATES, 4), whole.effective_weight(RATES, 4))
    if spec in ("rloo", "passk:1"):  # already a mean over all groups
        torch.testing.assert_close(grouped.coefficients(n, c), whole.coefficients(n, c), rtol=1e-9, atol=1e-12)
    with pytest.raises(GuardError, match="num_samples"):
        whole.in_groups_of(0)
