"""The change by solve rate: exactly unbiased by enumeration of all samples, and its parts add up to the whole."""

import itertools
import math

import pytest
import torch

from passk_guard.change import change_by_solve_rate
from passk_guard.utils.errors import GuardError

OLD, NEW, RIGHT = [0.5, 0.3, 0.2], [0.45, 0.25, 0.3], [1, 0, 0]
N = 4


def outcomes():
    """Every sample of N completions of one prompt: its probability, log ratios and verdicts."""
    for draw in itertools.product(range(3), repeat=N):
        yield (
            math.prod(OLD[y] for y in draw),
            torch.tensor([[math.log(NEW[y] / OLD[y]) for y in draw]], dtype=torch.float64),
            torch.tensor([[RIGHT[y] for y in draw]]),
        )


def test_each_group_has_the_change_times_the_chance_of_its_solve_rate():
    found = [0.0, 0.0, 0.0]
    for probability, log_ratios, correct in outcomes():
        for g, group in enumerate(change_by_solve_rate(log_ratios, correct)):
            if group.share:
                found[g] += probability * group.share * group.pass_at_1
    p = OLD[0]
    rates = [math.comb(N - 1, o) * p**o * (1 - p) ** (N - 1 - o) for o in range(N)]
    expected = [rates[0], rates[1], rates[2] + rates[3]]  # solve rates of the others: 0, 1/3, 2/3 and 1
    assert found == pytest.approx([(NEW[0] - OLD[0]) * share for share in expected], abs=1e-12)


def test_groups_add_up_to_the_leave_one_out_change():
    generator = torch.Generator().manual_seed(0)
    log_ratios = 0.2 * torch.randn(20, 8, generator=generator, dtype=torch.float64)
    correct = torch.randint(-1, 2, (20, 8), generator=generator)
    correct[:, 0] = 1
    groups = change_by_solve_rate(log_ratios, correct, edges=(0.1, 0.2, 0.5, 0.9))
    assert [group.low for group in groups] == [0.0, 0.1, 0.2, 0.5, 0.9]
    assert sum(group.share for group in groups) == pytest.approx(1.0)
    counted = correct >= 0
    total = 0.0
    for x in range(20):
        r, rho = correct[x][counted[x]].double(), log_ratios[x][counted[x]].exp()
        n = len(r)
        baseline = (r.sum() - r) / max(1, n - 1)
        total += float(((rho - 1) * (r - baseline)).mean())
    parts = sum(group.share * group.pass_at_1 for group in groups if group.share)
    assert parts == pytest.approx(total / 20)


def test_a_group_without_samples_says_so():
    groups = change_by_solve_rate(torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.int64))
    assert [group.share for group in groups] == [0.0, 0.0, 1.0]
    assert math.isnan(groups[0].pass_at_1)
    assert groups[2].pass_at_1 == 0.0


@pytest.mark.parametrize("edges", [(0.5, 0.5), (0.0,), (0.2, 1.0), (0.7, 0.3)])
def test_edges_ascend(edges):
    with pytest.raises(GuardError, match="ascending `edges`"):
        change_by_solve_rate(torch.zeros(3, 4), torch.ones(3, 4), edges=edges)
