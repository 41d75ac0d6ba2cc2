"""The paper's quantities on its own toy and on closed-form toys."""

import json
import math
from pathlib import Path

import pytest
import torch

from passk_guard import GuardError, population_conflict

FOLDER = Path(__file__).parents[1] / "reference"
PAPER = json.loads((FOLDER / "paper_toy.json").read_text())["float64"]
TOYS = json.loads((FOLDER / "toys.json").read_text())


def paper_kernel():
    g = torch.tensor([PAPER["grad_p_easy"], PAPER["grad_p_hard"]], dtype=torch.float64)
    return g @ g.T, torch.tensor([PAPER["p_easy"], PAPER["p_hard"]], dtype=torch.float64)


def changes_sign(kernel, pass_rate, k, probability=None, *, within):
    """Whether the inner product goes from positive to negative within a distance of k."""
    below, above = (population_conflict(kernel, pass_rate, k + side, probability) for side in (-within, within))
    return below.inner_product > 0 > above.inner_product


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
    assert changes_sign(kernel, p, PAPER["k_star_real"], within=1e-9)


def test_one_weight_toy():
    toy = TOYS["one_weight"]
    p = torch.tensor([toy["p_easy"], toy["p_hard"]], dtype=torch.float64)
    g = (p * (1 - p) * torch.tensor([toy["phi_easy"], toy["phi_hard"]], dtype=torch.float64))[:, None]
    q = torch.tensor([toy["fraction_easy"], 1 - toy["fraction_easy"]], dtype=torch.float64)
    for row in toy["rows"]:
        assert population_conflict(g @ g.T, p, row["k"], q).inner_product == pytest.approx(
            row["inner_product"], abs=5e-7
        )
    assert changes_sign(g @ g.T, p, toy["k_star_value"], q, within=1e-9)


def test_two_weight_toy():
    toy = TOYS["two_weights"]
    p = torch.tensor([toy["p_easy"], toy["p_hard"]], dtype=torch.float64)
    q = torch.tensor([toy["fraction_easy"], 1 - toy["fraction_easy"]], dtype=torch.float64)

    def kernel(rho):
        phi = torch.tensor([[1.0, 0.0], [rho, math.sqrt(1 - rho**2)]], dtype=torch.float64)
        g = (p * (1 - p))[:, None] * phi
        return g @ g.T

    for rho, k_star in toy["k_star_by_rho"].items():
        assert changes_sign(kernel(float(rho)), p, k_star, q, within=1e-3)
    row = toy["row"]
    found = population_conflict(kernel(row["rho"]), p, row["k"], q)
    assert found.inner_product == pytest.approx(row["inner_product"], abs=5e-6)
    assert found.cosine == pytest.approx(row["cosine"], abs=5e-4)


def test_misuse():
    with pytest.raises(GuardError, match=r"\(2, 2\)"):
        population_conflict(torch.ones(3, 3), torch.tensor([0.1, 0.2]), 4)
    with pytest.raises(GuardError, match="summing to 1"):
        population_conflict(torch.ones(2, 2), torch.tensor([0.1, 0.2]), 4, torch.tensor([0.5, 0.6]))
