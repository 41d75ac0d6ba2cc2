"""The paper's quantities on its own toy and on closed-form toys."""

import json
import math
from pathlib import Path

import pytest
import torch

from passk_guard import GuardError, population_conflict
from passk_guard.passk.population import conflict_threshold, population_k_star

FOLDER = Path(__file__).parents[1] / "reference"
PAPER = json.loads((FOLDER / "paper_toy.json").read_text())["float64"]
TOYS = json.loads((FOLDER / "toys.json").read_text())


def paper_kernel():
    g = torch.tensor([PAPER["grad_p_easy"], PAPER["grad_p_hard"]], dtype=torch.float64)
    return g @ g.T, torch.tensor([PAPER["p_easy"], PAPER["p_hard"]], dtype=torch.float64)


def test_paper_toy():
    kernel, p = paper_kernel()
    found = population_conflict(kernel, p, 10)
    assert found.inner_product == pytest.approx(PAPER["inner_product"], rel=1e-12)
    assert found.cosine == pytest.approx(PAPER["cosine"], rel=1e-12)
    assert found.agreement.tolist() == pytest.approx([PAPER["agreement_easy"], PAPER["agreement_hard"]], rel=1e-12)
    assert found.weight.tolist() == pytest.approx([PAPER["w_easy"], PAPER["w_hard"]], rel=1e-9)
    assert found.mixing == pytest.approx(PAPER["mixing_lambda"], rel=1e-10)
    assert found.mean_weight * found.norm1**2 + found.weight_agreement_cov == pytest.approx(found.inner_product)
    for k, value in PAPER["inner_product_by_k"].items():
        assert population_conflict(kernel, p, int(k)).inner_product == pytest.approx(value, rel=1e-10)
    assert population_k_star(kernel, p) == pytest.approx(PAPER["k_star_real"], abs=1e-9)


def test_one_weight_toy():
    toy = TOYS["one_weight"]
    p = torch.tensor([toy["p_easy"], toy["p_hard"]], dtype=torch.float64)
    g = (p * (1 - p) * torch.tensor([toy["phi_easy"], toy["phi_hard"]], dtype=torch.float64))[:, None]
    q = torch.tensor([toy["fraction_easy"], 1 - toy["fraction_easy"]], dtype=torch.float64)
    for row in toy["rows"]:
        assert population_conflict(g @ g.T, p, row["k"], q).inner_product == pytest.approx(
            row["inner_product"], abs=5e-7
        )
    assert population_k_star(g @ g.T, p, q) == pytest.approx(toy["k_star_value"], abs=1e-9)


def test_two_weight_toy():
    toy = TOYS["two_weights"]
    p = torch.tensor([toy["p_easy"], toy["p_hard"]], dtype=torch.float64)
    q = torch.tensor([toy["fraction_easy"], 1 - toy["fraction_easy"]], dtype=torch.float64)

    def kernel(rho):
        phi = torch.tensor([[1.0, 0.0], [rho, math.sqrt(1 - rho**2)]], dtype=torch.float64)
        g = (p * (1 - p))[:, None] * phi
        return g @ g.T

    for rho, k_star in toy["k_star_by_rho"].items():
        assert population_k_star(kernel(float(rho)), p, q) == pytest.approx(k_star, abs=1e-3)
    row = toy["row"]
    found = population_conflict(kernel(row["rho"]), p, row["k"], q)
    assert found.inner_product == pytest.approx(row["inner_product"], abs=5e-6)
    assert found.cosine == pytest.approx(row["cosine"], abs=5e-4)


def test_no_conflict_has_no_k_star():
    assert population_k_star(torch.ones(2, 2), torch.tensor([0.5, 0.1])) is None


def test_the_sufficient_threshold_is_above_the_true_one():
    """Prop. 4.5 on the paper's toy: both prompts at their exact margins."""
    kernel, p = paper_kernel()
    bound = math.sqrt(float(kernel.diagonal().max()))
    threshold = conflict_threshold(0.5, bound, -PAPER["agreement_hard"], float(p[0]), float(p[1]))
    assert threshold > PAPER["k_star_real"]
    assert population_conflict(kernel, p, threshold).inner_product < 0


def test_misuse():
    with pytest.raises(GuardError, match=r"\(2, 2\)"):
        population_conflict(torch.ones(3, 3), torch.tensor([0.1, 0.2]), 4)
    with pytest.raises(GuardError, match="summing to 1"):
        population_conflict(torch.ones(2, 2), torch.tensor([0.1, 0.2]), 4, torch.tensor([0.5, 0.6]))
    with pytest.raises(GuardError, match="hard_mass"):
        conflict_threshold(0, 1, 1, 0.9, 0.1)
