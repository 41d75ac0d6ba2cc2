"""The band over all k: what it covers in simulations, and what it is without any spread."""

import math

import pytest
import torch

from passk_guard import GuardError, pass_at_k
from passk_guard.estimation.band import simultaneous_band, unseen_share, upper_bound
from passk_guard.estimation.intervals import student_t_quantile

KS = torch.arange(1, 17)


def rates(m, generator):
    """Pass rates of A and B on m prompts: B is worse where A is good and better where it is bad."""
    p = torch.rand(m, generator=generator, dtype=torch.float64).square()
    return p, 0.8 * p + 0.1 * torch.rand(m, generator=generator, dtype=torch.float64)


def differences(m, generator):
    """[m, 16] unbiased differences of pass@1..16 from 16 samples a prompt; neighbouring columns are alike."""
    counts = [torch.binomial(torch.full_like(p, 16), p, generator=generator) for p in rates(m, generator)]
    a, b = (pass_at_k(16, c[:, None], KS) for c in counts)
    return b - a


def test_the_band_covers_all_k_together_and_pointwise_intervals_do_not():
    generator = torch.Generator().manual_seed(1)
    p, q = rates(1_000_000, generator)
    truth = ((1 - p[:, None]) ** KS - (1 - q[:, None]) ** KS).mean(0)
    runs, m, joint, pointwise, above = 500, 60, 0, 0, 0
    for seed in range(runs):
        given = differences(m, generator)
        band = simultaneous_band(given, draws=1000, seed=seed)
        joint += bool(((band.low <= truth) & (truth <= band.high)).all())
        room = student_t_quantile(0.975, m - 1) * band.standard_error
        pointwise += bool(((band.mean - truth).abs() <= room).all())
        above += upper_bound(given[:, 0]) < float(truth[0])
    assert 0.92 <= joint / runs <= 0.98  # 95% within three standard deviations of 500 runs
    assert pointwise / runs < 0.91
    assert above / runs <= 0.08, "a loss that is exactly the tolerance is called in one run of twenty"


def test_mean_and_error_are_those_of_a_loop():
    given = differences(7, torch.Generator().manual_seed(2))
    band = simultaneous_band(given)
    for j in range(16):
        column = given[:, j].tolist()
        mean = sum(column) / 7
        error = math.sqrt(sum((x - mean) ** 2 for x in column) / 6 / 7)
        assert float(band.mean[j]) == pytest.approx(mean, abs=1e-14)
        assert float(band.standard_error[j]) == pytest.approx(error, abs=1e-14)
        assert float(band.high[j]) == pytest.approx(min(1, mean + band.critical * error))
        assert float(band.low[j]) == pytest.approx(max(-1, mean - band.critical * error))


def test_one_column_has_students_interval_and_copies_of_it_no_wider_one():
    column = torch.randn(200, 1, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    one, copies = simultaneous_band(column), simultaneous_band(column.expand(-1, 8))
    assert one.critical == pytest.approx(student_t_quantile(0.975, 199), rel=0.05)
    assert copies.critical == pytest.approx(one.critical, rel=1e-9)
    apart = torch.randn(200, 8, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    assert simultaneous_band(apart).critical == pytest.approx(2.73, abs=0.12), "8 independent ones: 1 - 0.95^(1/8)"


def test_the_same_seed_gives_the_same_band():
    given = differences(30, torch.Generator().manual_seed(4))
    first, again, other = (simultaneous_band(given, draws=500, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.low, again.low)
    assert first.critical != other.critical


def test_without_any_spread_the_bounds_are_of_prompts_not_seen():
    """30 prompts alike: with a share s of others, all 30 are alike with a chance of (1 - s)^30."""
    assert (1 - unseen_share(30, 0.025)) ** 30 == pytest.approx(0.025)
    for d in (0.0, -1.0, 0.1):
        band = simultaneous_band(torch.full((30, 2), d, dtype=torch.float64))
        share = unseen_share(30, 0.025)
        assert band.standard_error.tolist() == [0.0, 0.0]
        assert band.low.tolist() == pytest.approx([(1 - share) * d - share] * 2)
        assert band.high.tolist() == pytest.approx([(1 - share) * d + share] * 2)
    lost = torch.full((3,), -1.0)
    assert upper_bound(lost) > 0, "three prompts of which all are lost establish nothing"
    assert upper_bound(torch.full((10,), -1.0)) < 0


def test_a_constant_column_beside_others_does_not_widen_them():
    given = differences(30, torch.Generator().manual_seed(5))
    alone = simultaneous_band(given)
    beside = simultaneous_band(torch.cat([given, torch.zeros(30, 1)], 1))
    assert torch.equal(beside.high[:-1], alone.high)


@pytest.mark.parametrize(
    ("given", "more", "words"),
    [
        (torch.zeros(2, 4), {}, "at least 3 prompts"),
        (torch.zeros(4), {}, r"shape \[prompts, K\]"),
        (torch.tensor(0.5), {}, "found 0"),
        (torch.full((4, 1), 1.5), {}, "in \\[-1, 1\\]"),
        (torch.full((4, 1), math.nan), {}, "NaN"),
        (torch.zeros(4, 1), {"confidence": 1.0}, "`confidence` < 1"),
        (torch.zeros(4, 1), {"draws": 0}, "`draws` >= 1"),
    ],
)
def test_what_is_refused(given, more, words):
    with pytest.raises(GuardError, match=words):
        simultaneous_band(given, **more)
