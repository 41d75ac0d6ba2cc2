"""Prompts that are asked again: what they bring to the variance, and how much they can add to the evidence."""

import math
from dataclasses import replace

import pytest
import torch

from passk_guard import run_p_value
from passk_guard.estimation.evidence import Check, RunEvidence, conflict_check
from passk_guard.estimation.recurrence import _share, prompt_variance
from passk_guard.estimation.ustatistics import passk_rows, refresh_moments
from tests.helpers.populations import ask, choose, draw, population


@pytest.mark.parametrize("power", [0, 1, 3, 14])
def test_products_of_right_and_wrong_sums_have_the_prompts_weight(power):
    """Given c, E[S+] = c grad p / p and E[S-] = -(n - c) grad p / (1 - p); the mean over c by enumeration."""
    n = 16
    c = torch.arange(n + 1, dtype=torch.float64)
    choices = torch.tensor([math.comb(n, i) for i in range(n + 1)], dtype=torch.float64)
    for p in (0.02, 0.3, 0.93):
        chance = choices * p**c * (1 - p) ** (n - c)
        product = c * (n - c) / (p * (1 - p))
        found = float((chance * product * _share(torch.full_like(c, n), c, power)).sum())
        assert found == pytest.approx((1 - p) ** power, rel=1e-10)


def test_the_prompt_variance_is_what_the_mean_over_many_samples_keeps():
    """200 sets of 32 prompts, 6 checks each: the means of the sets scatter by v_P and a sixth of the rest."""
    pop, generator, values, parts, whole = population(-0.4), torch.Generator().manual_seed(1), [], [], []
    slope = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    for _ in range(200):
        prompts = choose(pop, 32, generator)
        probes = [ask(pop, prompts, 16, generator) for _ in range(6)]
        moments = [refresh_moments(probe, passk_rows(torch.tensor([8]))) for probe in probes]
        values.append([float(moment.value[0, 0]) for moment in moments])
        whole += [float(moment.jackknife[0, 0, 0]) for moment in moments]
        parts += [prompt_variance(p, 8, slope, value) for p, value in zip(probes, values[-1], strict=True)]
    values = torch.tensor(values, dtype=torch.float64)
    between = float(values.mean(1).var() - values.var(1).mean() / 6)
    found = sum(parts) / len(parts)
    assert found == pytest.approx(between, rel=0.35)
    assert found < 0.85 * sum(whole) / len(whole)


def test_below_2k_samples_all_of_the_variance_is_the_prompts():
    check = conflict_check(draw(population(-0.4), 16, 15, torch.Generator().manual_seed(0)), 8, share=0.5)
    assert check.prompt_variance == check.variance
    assert check.share == 0.5


def test_a_set_asked_again_and_again_is_seldom_called_a_conflict():
    """20 sets of 32 prompts of a population with cosine 0, 25 checks each. Taken for new prompts, some are called."""
    pop, generator = population(0.0), torch.Generator().manual_seed(3)
    again = new = 0
    for _ in range(20):
        prompts = choose(pop, 32, generator)
        probes = [ask(pop, prompts, 16, generator, range(32)) for _ in range(25)]
        again += min(run_p_value(probes, 8)) <= 0.05
        evidence = [RunEvidence()]
        for probe in probes:
            evidence.append(evidence[-1].with_check(conflict_check(probe, 8)))
        new += min(found.p_value for found in evidence) <= 0.05
    assert again <= 1
    assert new >= 4, "what the rule is for"


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_evidence_of_a_set_ends_where_its_prompts_would_be_known(share):
    def p_values(checks):
        evidence, found = RunEvidence(), []
        for check in checks:
            evidence = evidence.with_check(check)
            found.append(evidence.p_value)
        return found

    count = 400
    again = p_values([Check(1.0, 1.0, 50.0, share, 0.5)] * count)
    new = p_values([Check(1.0, 1.0, 50.0)] * count)
    first = round(1 / share)
    assert again[:first] == new[:first], "none has recurred yet"
    assert new[-1] < 1e-30
    limit = math.exp(-(1 / (0.5 * share)) / 2)
    assert min(again) > limit, "the score of 1/share checks whose samples are without end"


def test_the_variance_of_clusters_is_all_the_prompts():
    probe = draw(population(-0.4), 16, 16, torch.Generator().manual_seed(0), cluster=2)
    named = replace(probe, prompt_keys=tuple(i // 2 for i in range(16)))
    slope = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert prompt_variance(probe, 8, slope, 0.1) is not None
    assert prompt_variance(named, 8, slope, 0.1) is None
