"""The forms of one prompt against enumeration, brute force and finite differences."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passk_guard.change.per_prompt import log_symmetric_mean, prompt_changes
from tests.change.worlds import every_draw

CASES = json.loads((Path(__file__).parent / "reference.json").read_text())


def forms(then, now, right, n, k):
    """The five forms on everything that n samples can be, and how likely each is."""
    draws, chance = every_draw(then, n)
    found = prompt_changes((now / then).log()[draws], right[draws], torch.ones_like(draws, dtype=torch.bool), k)
    return chance, {
        "change_1": found.change_1,
        "change_1_plain": found.plain_1,
        "change_k": found.change_k,
        "change_k_plain": found.plain_k,
        "change_k_first_order": found.first_order_k,
        "controls": found.controls,
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"n{case['n']}k{case['k']}")
def test_means_and_variances_are_those_of_the_enumeration(case):
    then, now = (torch.tensor(case[name], dtype=torch.float64) for name in ("mu", "pi"))
    chance, found = forms(then, now, torch.tensor(case["right"]).bool(), case["n"], case["k"])
    assert (chance @ found.pop("controls")).abs().max() < 1e-12
    for name, values in found.items():
        mean = float(chance @ values)
        assert mean == pytest.approx(case["mean"][name], abs=1e-12), name
        assert float(chance @ (values - mean) ** 2) == pytest.approx(case["variance"][name], abs=1e-12), name


@pytest.mark.parametrize("n", [1, 2, 5])
def test_unbiased_for_every_k_up_to_n(n):
    then = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
    now, right = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64), torch.tensor([True, False, False])
    for k in range(1, n + 1):
        chance, found = forms(then, now, right, n, k)
        assert float(chance @ found["change_1"]) == pytest.approx(-0.3, abs=1e-13)
        for name in ("change_k", "change_k_plain"):
            assert float(chance @ found[name]) == pytest.approx(0.6**k - 0.9**k, abs=1e-13)


def test_small_steps_give_the_derivative():
    logits, slope = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64), torch.tensor([1.0, -0.5, 0.2, -0.7])
    right, step = torch.tensor([True, False, True, False]), 1e-6
    then, ahead = logits.softmax(0), (logits + step * slope).softmax(0)
    back = (logits - step * slope).softmax(0)
    exact = [(1 - (1 - p[right].sum()) ** 3) for p in (ahead, back)]
    chance, up = forms(then, ahead, right, 4, 3)
    _, down = forms(then, back, right, 4, 3)
    for name in ("change_k", "change_k_first_order"):
        assert float(chance @ (up[name] - down[name])) == pytest.approx(float(exact[0] - exact[1]), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=7),
    st.data(),
)
def test_symmetric_means_are_those_over_all_subsets(values, data):
    counted = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    k = data.draw(st.integers(1, len(values)))
    found = log_symmetric_mean(torch.tensor(values, dtype=torch.float64), torch.tensor(counted), k)
    there = [value for value, yes in zip(values, counted, strict=True) if yes]
    subsets = [math.fsum(subset) for subset in itertools.combinations(there, k)]
    if not subsets:
        assert float(found) == -math.inf
    else:
        expected = torch.tensor(subsets, dtype=torch.float64).logsumexp(0) - math.log(len(subsets))
        assert float(found) == pytest.approx(float(expected), rel=1e-13, abs=1e-12)


def test_ratios_of_one_change_nothing_at_all():
    right = torch.arange(9) <= torch.arange(-1, 9)[:, None]
    found = prompt_changes(torch.zeros(10, 9, dtype=torch.float64), right, torch.ones(10, 9, dtype=torch.bool), 4)
    assert all(values.eq(0).all() for values in (found.change_1, found.change_k, found.controls))


def test_a_thousand_samples_with_ratios_from_e_minus_50_to_e_50():
    n = 1024
    logs = torch.linspace(-50, 50, n, dtype=torch.float64)[torch.randperm(n, generator=torch.manual_seed(0))]
    right = torch.arange(n) % 3 == 0
    here = torch.ones(1, n, dtype=torch.bool)
    for k in (1, 2, 8):
        found = prompt_changes(logs[None], right[None], here, k)
        assert found.change_1.isfinite().all()
        assert found.change_k.isfinite().all()
    # Of k = n only one subset is left: the product of all the ratios, which is e^0.
    nothing_right = torch.zeros(1, n, dtype=torch.bool)
    halves = torch.cat([torch.full((n // 2,), 50.0), torch.full((n // 2,), -50.0)]).double()[None]
    found = log_symmetric_mean(halves, here, n)
    assert float(found) == pytest.approx(0.0, abs=1e-9)
    assert float(prompt_changes(halves, nothing_right, here, 512).plain_k) == -math.inf


def test_one_sided_prompts_and_a_single_sample():
    logs = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64)
    here = torch.ones(1, 3, dtype=torch.bool)
    for right in (~here, here):
        assert prompt_changes(logs, right, here, 2).change_1.abs().max() < 1e-15
    alone = prompt_changes(logs, torch.tensor([[True, False, False]]), torch.tensor([[True, False, False]]), 2)
    assert float(alone.change_1) == pytest.approx(math.expm1(0.3), abs=1e-15)
    assert alone.change_k.isnan().all(), "one sample says nothing of pass@2"
