"""The quick form of the calibration of kept rollouts, under a moving policy."""

import math

import torch

from benchmarks import calibration_reuse, calibration_reuse_runs
from benchmarks.calibration_reuse_draws import NOW, cosine_of, with_cosine
from benchmarks.calibration_reuse_runs import POOL, Observed, path

RUNS = 30


def furthest(share, runs):
    return 3 * math.sqrt(share * (1 - share) / runs)


def test_the_exact_gradients_are_finite_differences_of_the_pass_rates():
    population = with_cosine(-0.4)

    def rates(theta):
        wrong = 1 - (population.policy(theta) * population.right).sum(1)
        return (1 - wrong).mean(), (1 - wrong**8).mean()

    one, many = population.gradients(NOW)
    direction = torch.randn(NOW.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ahead, behind = rates(NOW + 1e-5 * direction), rates(NOW - 1e-5 * direction)
    for gradient, up, down in zip((one, many), ahead, behind, strict=True):
        torch.testing.assert_close(gradient @ direction, (up - down) / 2e-5, rtol=1e-6, atol=1e-9)
    assert abs(cosine_of(population.products(NOW)) + 0.4) < 1e-6


def test_kept_rollouts_serve_their_refreshes_and_are_pooled_once():
    population, generator = with_cosine(0.0), torch.Generator().manual_seed(0)
    run, policy = Observed(population, 3, generator), path(population, 0.02)
    for time in range(7):
        run.refresh(policy(6 - time), time)
    assert run.times == (5, 6)
    assert [probe.reused for probe in run.memory.pooled(POOL)] == [True, False]
    assert (run.share, run.early) == (1.0, 0)
    run, policy = Observed(population, 3, generator), path(population, 0.6)
    for time in range(4):
        run.refresh(policy(3 - time), time)
    assert run.times == (1, 2, 3)
    assert run.early == 3


def test_kept_rollouts_of_an_earlier_policy_are_unbiased_for_the_newest():
    found = calibration_reuse.measure(-0.4, 0.3, RUNS, 0)
    assert 0.8 < found["effective_samples"] < 0.95
    assert abs(found["inner_bias_in_errors"]) < 3.5


def test_the_pool_of_a_moving_policy_holds_its_own_cosine():
    found = calibration_reuse_runs.measure(0.0, 3, 0.05, 16, 0)
    assert 0.9 < found["effective_samples"] < 1
    assert abs(found["lag"]) < 0.01
    assert found["covered_95_of_pool"] >= 0.95 - furthest(0.95, 16)
    assert found["conflict"] <= 0.05 + furthest(0.05, 16)


def test_a_pool_lags_no_more_behind_a_fast_policy_where_draws_serve_longer():
    found = calibration_reuse_runs.measure(-0.4, 5, 0.1, 10, 0)
    assert found["effective_samples"] < 0.93
    assert abs(found["lag"]) < 0.01, "0.20 where as many draws were pooled, however old"
    assert found["covered_95"] >= 0.95 - furthest(0.95, 10)
