"""PKPO's transforms against their definition as sums over subsets, and against the reference numbers."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passk_guard import GuardError, max_at_k, pkpo_transform

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "estimators.json").read_text())


def brute_force(g, k, baseline):
    n = len(g)
    subsets = list(itertools.combinations(range(n), k))

    def s_of(i, among):
        return sum(max(g[j] for j in s) for s in itertools.combinations(among, k) if i in s) / math.comb(len(among), k)

    values = []
    for i in range(n):
        rest = [j for j in range(n) if j != i]
        value = s_of(i, range(n))
        if baseline == "leave_one_out":
            value -= sum(s_of(j, rest) for j in rest) / len(rest)
        if baseline == "leave_one_out_minus_one":
            without = [max((g[j] for j in s if j != i), default=0.0) for s in subsets if i in s]
            value -= sum(without) / math.comb(n, k)
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=7), st.data())
def test_transforms_are_their_definition(g, data):
    baseline = data.draw(st.sampled_from(["none", "leave_one_out", "leave_one_out_minus_one"]))
    k = data.draw(st.integers(1, len(g) - (baseline == "leave_one_out")))
    found = pkpo_transform(torch.tensor(g, dtype=torch.float64), k, baseline=baseline)
    assert torch.allclose(found, brute_force(g, k, baseline), atol=1e-10)


def test_reference_real_rewards():
    row = REFERENCE["pkpo_real_rewards"]
    g = torch.tensor(row["g"], dtype=torch.float64)
    assert float(max_at_k(g, row["k"])) == pytest.approx(row["rho"])
    for name, baseline in (("s", "none"), ("s_loo", "leave_one_out"), ("s_loo_minus_one", "leave_one_out_minus_one")):
        assert pkpo_transform(g, row["k"], baseline=baseline).tolist() == pytest.approx(row[name], abs=1e-12)


def test_reference_binary_rewards():
    row = REFERENCE["pkpo_binary"][0]
    g = torch.zeros(row["n"])
    g[: row["c"]] = 1
    for name, baseline in (("s", "none"), ("s_loo", "leave_one_out"), ("s_loo_minus_one", "leave_one_out_minus_one")):
        s = pkpo_transform(g, row["k"], baseline=baseline)
        assert float(s[0]) == pytest.approx(row[f"{name}_correct"])
        assert float(s[-1]) == pytest.approx(row[f"{name}_wrong"], abs=1e-12)


@pytest.mark.parametrize("row", REFERENCE["bernoulli_policy_variance"]["rows"])
def test_reference_variances(row):
    n, k, p = row["n"], row["k"], row["p"]
    outcomes = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=torch.float64)
    chance = (p**outcomes * (1 - p) ** (1 - outcomes)).prod(1)
    for name, baseline in (("s", "none"), ("s_loo", "leave_one_out"), ("s_loo_minus_one", "leave_one_out_minus_one")):
        gradient = (pkpo_transform(outcomes, k, baseline=baseline) * (outcomes - p)).sum(1)
        mean = float((chance * gradient).sum())
        assert mean == pytest.approx(row["target"], abs=1e-5)
        assert float((chance * gradient**2).sum()) - mean**2 == pytest.approx(row[f"var_{name}"], abs=1e-5)


def test_batches_and_order_are_kept():
    g = torch.tensor([[3.0, 1, 2], [1, 2, 3]])
    batch = pkpo_transform(g, 2)
    assert torch.allclose(batch[0], pkpo_transform(g[0], 2))
    assert torch.allclose(batch[0][[1, 2, 0]], batch[1])


def test_misuse():
    with pytest.raises(GuardError, match="k=4, n=3"):
        pkpo_transform(torch.ones(3), 4)
    with pytest.raises(GuardError, match="k < n"):
        pkpo_transform(torch.ones(3), 3, baseline="leave_one_out")
    with pytest.raises(GuardError, match="baseline"):
        pkpo_transform(torch.ones(3), 2, baseline="loo")
