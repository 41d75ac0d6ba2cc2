"""Advantages for the expected maximum of k rewards, against enumeration of all draws and of all subsets."""

import itertools
import math

import pytest
import torch

from passk_guard import GuardError, passk_advantages
from passk_guard.passk import max_at_k_advantages

LOGITS = torch.tensor([0.4, -0.7, 0.1, -1.5], dtype=torch.float64)
REWARDS = torch.tensor([0.0, 0.3, 0.3, 1.7], dtype=torch.float64) - 0.4  # partial credit, a tie, a negative one


def by_subsets(r, k, baseline):
    """k (G_i - B_i) as the docstring has it: loops over samples and subsets."""
    n, found = len(r), []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        subsets = list(itertools.combinations(others, k - 1))

        def adds(j, subsets=subsets):
            best = [max((r[x] for x in subset), default=0.0) for subset in subsets]
            return sum(r[j] - b if k == 1 else max(r[j] - b, 0.0) for b in best) / len(subsets)

        average = sum(adds(j) for j in others) / (n - 1) if baseline and n > 1 else 0.0
        found.append(k * (adds(i) - average))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 1), (3, 2), (4, 2), (4, 3), (4, 4)])
def test_the_expected_estimate_is_the_gradient_of_the_expected_maximum(n, k, baseline):
    """Every draw of n samples from 4 answers, weighted by its probability; autograd through every draw of k."""
    theta = LOGITS.clone().requires_grad_()
    policy = theta.softmax(0)
    draws = torch.tensor(list(itertools.product(range(4), repeat=k)))
    (policy[draws].prod(1) * REWARDS[draws].amax(1)).sum().backward()
    draws = torch.tensor(list(itertools.product(range(4), repeat=n)))
    advantages = max_at_k_advantages(REWARDS[draws], k, baseline=baseline)
    score = torch.eye(4, dtype=torch.float64) - policy.detach()
    estimates = (advantages[:, :, None] * score[draws]).mean(1)
    expected = policy.detach()[draws].prod(1) @ estimates
    assert torch.allclose(expected, theta.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_it_is_the_mean_over_subsets(k, baseline):
    r = torch.tensor([0.2, -1.0, 0.2, 3.0, 0.9, 0.0, 0.9], dtype=torch.float64)
    found = max_at_k_advantages(r[None], k, baseline=baseline)[0]
    assert torch.allclose(found, by_subsets(r.tolist(), k, baseline), rtol=1e-12, atol=1e-14)


def test_on_0_1_rewards_it_is_pass_at_k_with_missing_ones_and_empty_groups_alike():
    generator = torch.Generator().manual_seed(0)
    right = (torch.rand(60, 9, generator=generator) < torch.rand(60, 1, generator=generator)).double()
    mask = torch.rand(60, 9, generator=generator) < 0.8
    mask[:3] = False
    for k in (1, 2, 4):
        seen = mask & (mask.sum(1, keepdim=True) >= k)
        rewards = torch.where(seen, right, torch.nan)
        found, expected = max_at_k_advantages(rewards, k, mask=seen), passk_advantages(right, k, mask=seen)
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13)
        assert not found[:3].any()


def test_the_baseline_takes_noise_away_and_a_shift_changes_nothing():
    generator = torch.Generator().manual_seed(1)
    rewards = torch.rand(500, 16, generator=generator, dtype=torch.float64)
    for k in (1, 2, 8):
        found = max_at_k_advantages(rewards, k)
        assert torch.allclose(found, max_at_k_advantages(rewards + 3, k), atol=1e-12)
        assert float(found.square().mean()) < float(max_at_k_advantages(rewards, k, baseline=False).square().mean())


@pytest.mark.parametrize("k", [1, 2, 32, 512, 1023, 1024])
def test_a_thousand_samples_keep_their_digits(k):
    """Of 1024 equally spaced rewards the largest adds, to k - 1 others, the exact sum of chances, in integers."""
    n = 1024
    r = torch.arange(n, dtype=torch.float64)
    found = max_at_k_advantages(
        r[torch.randperm(n, generator=torch.Generator().manual_seed(0))][None], k, baseline=False
    )
    ways = sum(math.comb(j, k - 1) for j in range(1, n))
    assert float(found.max()) == pytest.approx(k * ways / math.comb(n - 1, k - 1), rel=1e-10)
    full = max_at_k_advantages(r[None], k)
    assert bool(full.isfinite().all())
    assert max_at_k_advantages(r[None].float(), k).dtype == torch.float32


@pytest.mark.parametrize(
    ("rewards", "k", "mask", "words"),
    [
        (torch.zeros(4), 2, None, "[prompts, samples]; found (4,)"),
        ([[1.0]], 1, None, "found list"),
        (torch.zeros(1, 4), 5, None, "num_samples=4, k=5"),
        (torch.zeros(1, 4), 2, torch.ones(1, 3), "`mask` of shape (1, 4)"),
        (torch.tensor([[0.0, math.nan]]), 1, None, "Leave such samples out with `mask`"),
    ],
)
def test_misuse_says_what_to_change(rewards, k, mask, words):
    with pytest.raises(GuardError) as error:
        max_at_k_advantages(rewards, k, mask=mask)
    assert words in str(error.value)
