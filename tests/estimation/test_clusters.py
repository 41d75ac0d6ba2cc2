"""Prompts that are not independent: no pair within a cluster, one draw in every error. Against loops and simulation."""

import itertools
import math

import pytest
import torch

from passk_guard import ProbeGram, estimate_conflict, estimate_pooled
from passk_guard.change import estimate_change, estimate_level
from passk_guard.estimation.agreement import weight_and_agreement
from passk_guard.estimation.evidence import conflict_check
from passk_guard.estimation.power import measure_noise
from passk_guard.estimation.ustatistics import (
    clusters,
    jackknife_overshoot,
    passk_rows,
    pooled_moments,
    prompt_kernel,
    refresh_moments,
)
from passk_guard.passk.closed_forms import unbiased_passk_weight
from tests.estimation.test_estimate import gradients, gram_of, score_vectors
from tests.helpers.populations import draw, population

NAMES = list("abcadbadcc")  # of different sizes, and not side by side


def named(probe, names):
    return ProbeGram(probe.gram, probe.num_samples, probe.num_correct, names)


def pairs_of(names):
    return [(i, j) for i, j in itertools.permutations(range(len(names)), 2) if names[i] != names[j]]


def test_pairs_of_one_cluster_do_not_count_and_a_cluster_is_left_out_whole():
    correct, scores = score_vectors(m=10)
    found = refresh_moments(named(gram_of(correct, scores), NAMES), passk_rows(torch.tensor([1, 3])))
    g1, g3 = gradients(correct, scores, 1), gradients(correct, scores, 3)

    def by_loops(kept):
        pairs = [(i, j) for i, j in pairs_of(NAMES) if i in kept and j in kept]
        both = ((g3, g1), (g1, g1), (g3, g3))
        return torch.tensor([sum(float(a[i] @ b[j]) for i, j in pairs) / len(pairs) for a, b in both]).double()

    assert torch.allclose(found.value[1], by_loops(range(10)), rtol=1e-6)
    assert found.influence.shape == (4, 2, 3)
    for c, name in enumerate(dict.fromkeys(NAMES)):
        rest = by_loops([i for i in range(10) if NAMES[i] != name])
        assert torch.allclose(found.value[1] + found.influence[c, 1], rest, rtol=1e-5, atol=1e-7)


def test_what_is_said_of_prompts_leaves_their_clusters_out():
    correct, scores = score_vectors(m=10)
    probe = named(gram_of(correct, scores), NAMES)
    e = estimate_conflict(probe.gram, probe.num_samples, probe.num_correct, 3, prompt_keys=NAMES)
    g1, g3 = gradients(correct, scores, 1), gradients(correct, scores, 3)
    pairs = pairs_of(NAMES)
    expected = [
        sum(float(g1[x] @ g1[j]) for i, j in pairs if i == x) / sum(i == x for i, _ in pairs) for x in range(10)
    ]
    assert e.agreement.tolist() == pytest.approx(expected)
    weight = unbiased_passk_weight(torch.full((10,), 5), correct.sum(1).long(), 3)
    triples = [(h, i, j) for i, j in pairs for h in range(10) if NAMES[h] not in (NAMES[i], NAMES[j])]
    inner = sum(float(g3[i] @ g1[j]) for i, j in pairs) / len(pairs)
    product = sum(float(weight[h] * (g1[i] @ g1[j])) for h, i, j in triples) / len(triples)
    assert weight_and_agreement([probe], 3)["weight_agreement_cov"] == pytest.approx(inner - product)


def test_the_overshoot_of_equal_clusters_is_that_of_their_mean_kernel():
    probe = named(draw(population(-0.3), 24, 16, torch.Generator().manual_seed(0)), [i // 3 for i in range(24)])
    moments = refresh_moments(probe, passk_rows(torch.tensor([1])))
    one = passk_rows(torch.tensor([1]))(probe)[0]
    kernel = prompt_kernel(probe, one, one).view(8, 3, 8, 3).mean((1, 3))
    expected = jackknife_overshoot(kernel[None])[:, 0, 0]
    assert torch.allclose(moments.overshoots[:, 0, 0, 0], expected, rtol=1e-8)


def test_a_cluster_in_two_refreshes_is_left_out_of_both():
    probes = [named(gram_of(*score_vectors(m=10, seed=s)), NAMES) for s in (0, 1)]
    rows = passk_rows(torch.tensor([3]))
    shared = pooled_moments(probes, rows)
    alone = pooled_moments([probes[0], named(probes[1], [name * 2 for name in NAMES])], rows)
    assert torch.equal(clusters(probes[0]), torch.tensor([0, 1, 2, 0, 3, 1, 0, 3, 2, 2]))
    assert torch.allclose(shared.influence, alone.influence[:4] + alone.influence[4:])


def copies(seed, times=4):
    """Each prompt `times` times with samples of its own: paraphrases. And the same with names."""
    generator = torch.Generator().manual_seed(seed)
    probe = draw(population(0.0, spread=0.5), 64, 16, generator, times)
    return probe, named(probe, [i // times for i in range(64)])


def test_paraphrases_count_as_one_draw():
    """The standard error is that of the values over refreshes; without names it is far too small, and U is biased."""
    rows, found = passk_rows(torch.tensor([8])), {False: [], True: []}
    for seed in range(300):
        for with_names, probe in zip((False, True), copies(seed), strict=True):
            moments = refresh_moments(probe, rows)
            found[with_names].append((float(moments.value[0, 1]), float(moments.covariance[0, 1, 1])))
    values, variances = torch.tensor(found[True], dtype=torch.float64).T
    assert float(variances.mean()) == pytest.approx(float(values.var()), rel=0.3)
    plain, too_small = torch.tensor(found[False], dtype=torch.float64).T
    assert float(too_small.mean()) < 0.6 * float(plain.var())
    apart = float(values.std()) / math.sqrt(300)
    assert float(plain.mean() - values.mean()) > 5 * apart


def test_every_other_number_takes_the_clusters():
    probe, known = copies(0)
    assert conflict_check(known, 8).count < 16
    assert measure_noise(known, 8).error(0) == pytest.approx(conflict_check(known, 8).variance ** 0.5, rel=0.5)
    one, other = estimate_pooled([probe], 8), estimate_pooled([known], 8)
    assert other.pass_at_1 == one.pass_at_1
    assert other.pass_at_1_se > 1.5 * one.pass_at_1_se
    few = named(probe, [i % 2 for i in range(64)])
    assert "of 2 clusters" in estimate_pooled([few], 8).reason
    assert conflict_check(few, 8) is None


def test_the_realised_change_takes_a_cluster_for_one_draw():
    """Rows repeated four times: the error is that of the rows alone, of which there are as many as clusters."""
    generator = torch.Generator().manual_seed(0)
    logs = 0.2 * torch.randn(24, 8, dtype=torch.float64, generator=generator)
    correct = torch.randint(0, 2, (24, 8), generator=generator)
    names = [i for i in range(24) for _ in range(4)]
    logs, correct = logs.repeat_interleave(4, 0), correct.repeat_interleave(4, 0)
    found = estimate_change(logs, correct, 4, clusters=names)
    rows = found.per_prompt[::4], found.per_prompt_k[::4]
    assert (found.pass_at_1_se, found.pass_at_k_se) == pytest.approx(tuple(float(r.std()) / 24**0.5 for r in rows))
    assert found.degrees <= 23
    assert estimate_change(logs, correct, 4).pass_at_1_se < 0.6 * found.pass_at_1_se
    level = estimate_level(correct, 4, clusters=names)
    assert level.level_1_se == pytest.approx(float((correct[::4].double().mean(1)).std()) / 24**0.5)
    assert found.level.level_1_se == level.level_1_se


def test_a_norm_that_few_prompts_carry_has_no_number():
    """Four hard prompts among 60 easy ones give pass@8 its gradient, and agree by chance: a large U, and no number."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([1] * 4 + [13] * 60)
    sums = torch.randn(128, 30, dtype=torch.float64, generator=generator)
    sums[:, 0] += torch.tensor([12.0, -12.0]).repeat_interleave(64)
    gram = sums @ sums.T
    few = estimate_conflict(gram, torch.full((64,), 16), counts, 8)
    assert few.cosine is None
    assert few.status == "undetermined"
    assert "prompts' worth of signal carry the pass@8 gradient" in few.reason
    assert "solved sometimes" in few.reason
    more = torch.tensor([1] * 24 + [13] * 40)
    assert estimate_conflict(gram, torch.full((64,), 16), more, 8).cosine is not None
