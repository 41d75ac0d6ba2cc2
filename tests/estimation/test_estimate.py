"""The estimate: against loops over pairs, exact populations, and in repeated sampling."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from passk_guard import GuardError, ProbeGram, estimate_conflict, estimate_pooled, named_weighting, passk_advantages
from passk_guard.estimation import ustatistics
from passk_guard.estimation.agreement import weight_and_agreement
from passk_guard.estimation.evidence import conflict_check
from passk_guard.estimation.power import measure_noise
from passk_guard.estimation.ustatistics import (
    coefficients,
    jackknife_overshoot,
    other_prompt_sums,
    passk_rows,
    pooled_moments,
    prompt_kernel,
    refresh_moments,
)
from passk_guard.passk.closed_forms import population_conflict, unbiased_passk_weight
from tests.helpers.populations import DIM, draw, population, true_moments

PAPER = json.loads((Path(__file__).parents[1] / "reference" / "paper_toy.json").read_text())["float64"]


def score_vectors(m=6, n=5, seed=0):
    """Correct flags [m, n] and score vectors [m, n, DIM] of every sample."""
    generator = torch.Generator().manual_seed(seed)
    correct = (torch.rand(m, n, generator=generator) < torch.linspace(0.1, 0.9, m)[:, None]).double()
    correct[0] = 0
    correct[1, 0], correct[1, 1] = 1, 0
    noise = torch.randn(m, n, DIM, dtype=torch.float64, generator=generator)
    return correct, noise + 4 * (correct - correct.mean(1, keepdim=True))[..., None]  # a direction all prompts share


def gram_of(correct, scores):
    positive = (correct[..., None] * scores).sum(1)
    negative = ((1 - correct)[..., None] * scores).sum(1)
    sums = torch.cat([positive, negative])
    return ProbeGram(sums @ sums.T, torch.full((len(correct),), correct.shape[1]), correct.sum(1).long())


def gradients(correct, scores, k):
    """[m, DIM] leave-one-out gradient estimates from the samples themselves."""
    return (passk_advantages(correct, k)[..., None] * scores).mean(1)


def test_moments_are_means_over_pairs_of_different_prompts():
    correct, scores = score_vectors()
    moments = refresh_moments(gram_of(correct, scores), passk_rows(torch.arange(1, 6)))
    for k in range(1, 6):
        g1, gk = gradients(correct, scores, 1), gradients(correct, scores, k)
        pairs = list(itertools.permutations(range(6), 2))
        expected = [
            sum(float(left[i] @ right[j]) for i, j in pairs) / len(pairs)
            for left, right in ((gk, g1), (g1, g1), (gk, gk))
        ]
        assert moments.value[k - 1].tolist() == pytest.approx(expected, rel=1e-10)
        naive = [float(left.mean(0) @ right.mean(0)) for left, right in ((gk, g1), (g1, g1), (gk, gk))]
        assert moments.naive[k - 1].tolist() == pytest.approx(naive, rel=1e-10)


def test_leave_one_out_changes_are_what_leaving_out_does():
    correct, scores = score_vectors()
    ks = torch.arange(1, 6)
    moments = refresh_moments(gram_of(correct, scores), passk_rows(ks))
    for x in range(6):
        rest = [i for i in range(6) if i != x]
        without = refresh_moments(gram_of(correct[rest], scores[rest]), passk_rows(ks)).value
        assert torch.allclose(moments.value + moments.influence[x], without, rtol=1e-9, atol=1e-12)


def test_a_refresh_computes_its_moments_once(monkeypatch):
    """For the estimate, the evidence, the noise and later pools: one for k and one for the curve over k."""
    calls, compute = [], ustatistics.moments_of

    def counted(probe, many, one):
        calls.append(len(many))
        return compute(probe, many, one)

    monkeypatch.setattr(ustatistics, "moments_of", counted)
    generator = torch.Generator().manual_seed(0)
    probes = [draw(population(-0.4), 256, 16, generator) for _ in range(2)]
    assert estimate_pooled(probes[:1], 8).curve is not None
    assert conflict_check(probes[0], 8) is not None
    assert measure_noise(probes[0], 8) is not None
    assert calls == [1, 16]
    pooled = estimate_pooled(probes, 8)
    assert calls == [1, 16] * 2
    anew = [ProbeGram(p.gram.float().double(), p.num_samples, p.num_correct) for p in probes]
    assert pooled.cosine == pytest.approx(estimate_pooled(anew, 8).cosine, rel=1e-4)


def test_a_prompt_met_twice_is_left_out_twice():
    probes = [gram_of(*score_vectors(seed=seed)) for seed in (0, 1)]
    named = [ProbeGram(p.gram, p.num_samples, p.num_correct, list("abcdef")) for p in probes]
    ks = torch.tensor([4])
    alone = pooled_moments(probes, passk_rows(ks))
    shared = pooled_moments(named, passk_rows(ks))
    assert torch.equal(alone.value, shared.value)
    assert alone.influence.shape[0] == 12
    assert torch.allclose(shared.influence, alone.influence[:6] + alone.influence[6:])


def test_agreement_and_kernel():
    correct, scores = score_vectors(m=8)
    probe = gram_of(correct, scores)
    estimate = estimate_conflict(probe.gram, probe.num_samples, probe.num_correct, k=3)
    g1, g3 = gradients(correct, scores, 1), gradients(correct, scores, 3)
    kernel = g1 @ g1.T
    assert torch.allclose(estimate.kernel, kernel)
    off = kernel - kernel.diagonal().diag()
    assert torch.allclose(estimate.agreement, off.sum(1) / 7)
    cross = g3 @ g1.T
    assert torch.allclose(estimate.weighted_agreement, (cross - cross.diagonal().diag()).sum(1) / 7)
    assert float(estimate.weighted_agreement.mean()) == pytest.approx(estimate.inner_product)
    mixed = [x for x in range(8) if 0 < correct[x].sum() < 5]
    pairs = list(itertools.permutations(mixed, 2))
    assert estimate.frac_negative_pairs == pytest.approx(sum(float(kernel[i, j]) < 0 for i, j in pairs) / len(pairs))


def exact_prompts(pass_rate, gradient, n, copies):
    """Score sums for which g_1 of every prompt is exactly grad p, so that nothing is noise."""
    c = (pass_rate * n).round().long().repeat_interleave(copies)
    g = gradient.repeat_interleave(copies, 0)
    # g_1 = (1/n)(1 - (c-1)/(n-1)) S+ - (1/n)(c/(n-1)) S-; S- = 0 leaves g_1 = (n-c)/(n(n-1)) S+.
    positive = g * (n * (n - 1) / (n - c.double()))[:, None]
    sums = torch.cat([positive, torch.zeros_like(positive)])
    return ProbeGram(sums @ sums.T, torch.full((len(c),), n), c)


def test_exact_gradients_of_the_paper_toy_give_its_numbers():
    """U over m copies leaves same-prompt pairs out, and copies of a prompt stand in for them in the limit."""
    gradient = torch.tensor([PAPER["grad_p_easy"], PAPER["grad_p_hard"]], dtype=torch.float64)
    n, copies = 10_000, 40
    rate = torch.tensor([round(PAPER[f"p_{kind}"] * n) / n for kind in ("easy", "hard")], dtype=torch.float64)
    probe = exact_prompts(rate, gradient, n, copies)
    ks = torch.tensor([1, 2, 5, 10])
    m = 2 * copies
    moments = refresh_moments(probe, passk_rows(ks))
    same = gradient.square().sum(1).mean()  # the diagonal that U leaves out, for k = 1
    for i, k in enumerate(ks.tolist()):
        exact = population_conflict(gradient @ gradient.T, rate, k)
        weight = exact.weight
        own = (weight * gradient.square().sum(1)).mean()
        expected = (m * exact.inner_product - float(own)) / (m - 1)
        # The leave-one-out weight at c/n = p is w_k(p) up to 1/n.
        assert float(moments.value[i, 0]) == pytest.approx(expected, rel=5e-3, abs=1e-7)
        assert float(moments.value[i, 1]) == pytest.approx((m * exact.norm1**2 - float(same)) / (m - 1), rel=1e-9)
    assert population_conflict(gradient @ gradient.T, rate, 10).cosine == pytest.approx(PAPER["cosine"], abs=1e-3)


def test_scale_does_not_matter():
    generator = torch.Generator().manual_seed(3)
    probe = draw(population(-0.4), 192, 16, generator)
    reference = estimate_conflict(probe.gram, probe.num_samples, probe.num_correct, 8)
    for scale in (1e-20, 1e-6, 1e15):
        other = estimate_conflict(probe.gram * scale, probe.num_samples, probe.num_correct, 8)
        assert other.status == reference.status
        assert other.cosine == pytest.approx(reference.cosine, rel=1e-6)
        assert other.ci_low == pytest.approx(reference.ci_low, rel=1e-6)


def test_order_of_prompts_does_not_matter():
    generator = torch.Generator().manual_seed(3)
    probe = draw(population(-0.4), 32, 16, generator)
    order = torch.randperm(32, generator=generator)
    both = torch.cat([order, order + 32])
    one = estimate_conflict(probe.gram, probe.num_samples, probe.num_correct, 8)
    other = estimate_conflict(probe.gram[both][:, both], probe.num_samples[order], probe.num_correct[order], 8)
    assert other.inner_product == pytest.approx(one.inner_product)
    assert other.inner_product_se == pytest.approx(one.inner_product_se)
    assert other.weight_agreement_cov == pytest.approx(one.weight_agreement_cov)


def test_k_1_is_the_same_gradient():
    probe = draw(population(-0.4), 64, 16, torch.Generator().manual_seed(0))
    estimate = estimate_conflict(probe.gram, probe.num_samples, probe.num_correct, 1)
    assert estimate.cosine == pytest.approx(1)
    assert estimate.status == "clear"


def test_curve_and_k_star():
    generator = torch.Generator().manual_seed(0)
    probes = [draw(population(-0.4), 256, 16, generator) for _ in range(3)]
    estimate = estimate_pooled(probes, 8)
    curve = estimate.curve
    assert curve.k.tolist() == list(range(1, 17))
    assert float(curve.cosine[0]) == pytest.approx(1)
    assert float(curve.cosine[7]) == pytest.approx(estimate.cosine)
    assert estimate.status == "conflict"
    assert 1 <= estimate.k_star < 8
    assert not curve.established[: estimate.k_star].any()
    assert bool(curve.established[estimate.k_star])


def test_the_band_covers_all_k_together_and_the_set_the_true_k_star():
    """100 refreshes of 64 prompts x 8; an undetermined k has the band [-1, 1]."""
    pop, generator = population(-0.4, k=4), torch.Generator().manual_seed(6)
    truth = torch.tensor([inner / math.sqrt(a * b) for inner, a, b in (true_moments(pop, k) for k in range(1, 9))])
    k_star = int((truth < 0).int().argmax())
    joint = alone = in_set = 0
    estimates = [estimate_pooled([draw(pop, 64, 8, generator)], 4) for _ in range(100)]
    known = [e for e in estimates if e.curve is not None]
    for e in known:
        c = e.curve
        assert e.k_star_low <= e.k_star <= e.k_star_high
        low, high = torch.where(c.ci_low.isnan(), -1.0, c.ci_low), torch.where(c.ci_high.isnan(), 1.0, c.ci_high)
        assert bool((c.band_low <= low + 1e-6).all() and (high <= c.band_high + 1e-6).all())
        joint += bool(((c.band_low - 1e-6 <= truth) & (truth <= c.band_high + 1e-6)).all())
        alone += bool(((low - 1e-6 <= truth) & (truth <= high + 1e-6)).all())
        in_set += e.k_star_low <= k_star <= e.k_star_high
    assert len(known) > 50
    assert joint >= 0.9 * len(known)
    assert in_set >= 0.9 * len(known)
    assert alone < joint
    again = estimate_pooled([draw(pop, 64, 8, torch.Generator().manual_seed(1))], 4).curve
    once = estimate_pooled([draw(pop, 64, 8, torch.Generator().manual_seed(1))], 4).curve
    assert torch.equal(again.band_high, once.band_high)


def test_the_curve_has_no_number_where_no_cosine_can_be_ruled_out():
    """Few prompts carry grad J_16 of 16 samples, and its norm may be anything."""
    absent = 0
    for seed in range(12):
        probe = draw(population(-0.3), 64, 16, torch.Generator().manual_seed(seed))
        estimate = estimate_pooled([probe], 6)
        if estimate.curve is None:
            continue
        low, high, cosine = estimate.curve.ci_low, estimate.curve.ci_high, estimate.curve.cosine
        assert not ((low == -1) & (high == 1))[1:].any()
        assert torch.equal(cosine.isnan(), low.isnan())
        absent += int(cosine.isnan().sum())
    assert absent


def test_unbiased_where_the_naive_statistic_is_not():
    """400 refreshes of 24 prompts: the means of U agree with the truth, those over all pairs do not."""
    pop, k = population(-0.4, spread=0.5, noise=0.3), 8
    generator = torch.Generator().manual_seed(11)
    ks = torch.tensor([k])
    parts = [refresh_moments(draw(pop, 24, 16, generator), passk_rows(ks)) for _ in range(400)]
    truth = true_moments(pop, k)
    u = torch.stack([part.value[0] for part in parts])
    naive = torch.stack([part.naive[0] for part in parts])
    error = u.std(0) / math.sqrt(400)
    assert bool(((u.mean(0) - truth).abs() < 3.5 * error).all())
    assert bool(((naive.mean(0) - truth) > 8 * error).all()), "the naive statistic should lean towards no conflict"
    assert float(naive.mean(0)[0]) > 0 > float(truth[0]), "and even hide the sign here"


def test_weight_agreement_covariance_is_unbiased():
    pop, k = population(-0.4), 8
    generator = torch.Generator().manual_seed(5)
    found = [weight_and_agreement([draw(pop, 32, 16, generator)], k)["weight_agreement_cov"] for _ in range(400)]
    found = torch.tensor(found, dtype=torch.float64)
    g = (pop.pass_rate * (1 - pop.pass_rate))[:, None] * pop.means
    exact = population_conflict(g @ g.T, pop.pass_rate, k, pop.share)
    assert abs(float(found.mean()) - exact.weight_agreement_cov) < 3.5 * float(found.std()) / math.sqrt(len(found))


@pytest.mark.parametrize("cosine", [0.0, -0.4])
def test_interval_coverage_and_false_alarms(cosine):
    """300 runs of three pooled refreshes of 64 x 16; tolerances are three standard errors of a share of 300."""
    pop = population(cosine)
    generator = torch.Generator().manual_seed(17)
    pools = ([draw(pop, 64, 16, generator) for _ in range(3)] for _ in range(300))
    estimates = [estimate_pooled(probes, 8, curve=False) for probes in pools]
    determined = [e for e in estimates if e.cosine is not None]
    assert len(determined) > 290
    covered = sum(e.ci_low <= pop.cosine <= e.ci_high for e in determined) / len(determined)
    alarms = sum(e.status == "conflict" for e in determined) / len(determined)
    assert 0.91 <= covered <= 1.0
    if cosine == 0:
        assert alarms <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    else:
        assert alarms > 0.75, "power at -0.4"
    mean = sum(e.cosine for e in determined) / len(determined)
    assert mean == pytest.approx(cosine, abs=0.06)


def test_no_signal_is_undetermined_and_has_no_number():
    """Pure noise: the scores know nothing of correctness. A conflict may be established at its nominal rate only."""
    generator = torch.Generator().manual_seed(2)
    silent = 0
    for _ in range(60):
        c = torch.binomial(torch.full((32,), 16.0), torch.full((32,), 0.4), generator=generator).long()
        sums = torch.randn(64, DIM, dtype=torch.float64, generator=generator)
        estimate = estimate_conflict(sums @ sums.T, torch.full((32,), 16), c, 8)
        if estimate.cosine is None:
            silent += 1
            assert estimate.status == "undetermined"
            assert "signal" in estimate.reason
            assert estimate.k_star is None
            assert estimate.ci_low is None
    assert silent > 45


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([16] * 8, "8 were always solved"),
        ([0] * 8, "8 never"),
        ([0, 16, 0, 16, 0, 16, 5, 5], "leaves 2 with a gradient"),
        ([5], "only 1 prompts"),
        ([5, 6], "only 2 prompts"),
    ],
)
def test_probes_without_information(counts, words):
    sums = torch.randn(2 * len(counts), 9, dtype=torch.float64)
    estimate = estimate_conflict(sums @ sums.T, torch.full((len(counts),), 16), torch.tensor(counts), 8)
    assert estimate.status == "undetermined"
    assert words in estimate.reason
    assert estimate.cosine is None
    assert 0 <= estimate.pass_at_1 <= 1


def changed(size, *entries):
    """A valid Gram matrix, but for some entries (row, column, value)."""
    gram = torch.eye(size, dtype=torch.float64)
    for row, column, value in entries:
        gram[row, column] = value
    return gram


def estimate_of(gram=None, n=None, c=None, k=4, misses=None, m=8, **more):
    n, c = torch.full((m,), 8) if n is None else n, torch.arange(m) % 8 if c is None else c
    probe = ProbeGram(torch.eye(2 * m, dtype=torch.float64) if gram is None else gram, n, c, misses=misses)
    if misses is not None or gram is None:
        return estimate_pooled([probe], k, **more)
    return estimate_conflict(gram, n, c, k, **more)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"k": 9}, "num_samples=8, k=9"),
        ({"k": 0}, "k >= 1"),
        ({"k": 4.0}, "k=4.0"),
        ({"gram": torch.eye(8)}, "(8, 8)"),
        ({"gram": "a matrix"}, "`gram` to be a tensor of real numbers"),
        ({"gram": torch.zeros(16, 16, dtype=torch.complex64)}, "`gram` to be real"),
        ({"gram": changed(16, (3, 3, math.nan))}, "finite Gram"),
        ({"gram": changed(200, (7, 190, math.inf), (190, 7, math.inf)), "m": 100}, "finite Gram"),
        ({"gram": changed(200, (7, 190, -math.inf)), "m": 100}, "finite Gram"),
        ({"gram": changed(200, (0, 150, 1e-3)), "m": 100}, "symmetric"),
        ({"gram": changed(200, (131, 3, 1e-3)), "m": 100}, "symmetric"),
        ({"gram": changed(200, (199, 198, 1e-3)), "m": 100}, "symmetric"),
        ({"gram": changed(16, (0, 9, 1.1), (9, 0, 1.1))}, "above |a||b|"),
        ({"gram": changed(16, (2, 2, -1.0))}, "negative diagonal"),
        ({"gram": 1e100 * torch.eye(16, dtype=torch.float64)}, "beyond float64"),
        ({"gram": torch.zeros(0, 0), "n": torch.zeros(0), "c": torch.zeros(0)}, "at least one prompt"),
        ({"n": torch.tensor([8.0, 7.5] * 4)}, "`num_samples` to be a whole number"),
        ({"c": torch.full((8,), 9)}, "num_correct"),
        ({"gram": torch.eye(16), "prompt_keys": ["a"]}, "a list of 8"),
        ({"gram": torch.eye(16), "prompt_keys": [[]] * 8}, "can be hashed"),
        ({"confidence": 1.5}, "confidence"),
        ({"threshold": math.nan}, "threshold"),
        ({"misses": torch.ones(8, 4)}, "`misses` of shape (8, 8)"),
        ({"misses": torch.full((8, 8), math.inf)}, "`misses` to be finite"),
        ({"misses": torch.full((8, 8), -1.0)}, "not negative"),
        ({"misses": torch.ones(8, 8), "weighting": named_weighting("grpo")}, "fresh samples for `weighting`"),
        ({"weighting": named_weighting("passk:9")}, "`num_samples` >= 9"),
    ],
)
def test_misuse_says_what_to_change(arguments, words):
    estimate_of()
    with pytest.raises(GuardError) as error:
        estimate_of(**arguments)
    assert words in str(error.value)


def test_no_refresh_at_all_is_misuse():
    with pytest.raises(GuardError, match="at least one refresh"):
        estimate_pooled([], 4)


def test_covariance_is_a_mean_over_triples_of_different_prompts():
    correct, scores = score_vectors()
    g1, g3 = gradients(correct, scores, 1), gradients(correct, scores, 3)
    weight = unbiased_passk_weight(torch.full((6,), 5), correct.sum(1).long(), 3)
    pairs, triples = list(itertools.permutations(range(6), 2)), list(itertools.permutations(range(6), 3))
    inner = sum(float(g3[i] @ g1[j]) for i, j in pairs) / len(pairs)
    product = sum(float(weight[h] * (g1[i] @ g1[j])) for h, i, j in triples) / len(triples)
    found = weight_and_agreement([gram_of(correct, scores)], 3)
    assert found["weight_agreement_cov"] == pytest.approx(inner - product)
    assert found["mean_weight"] == pytest.approx(float(weight.mean()))


def test_a_weighting_takes_the_place_of_pass_at_k():
    correct, scores = score_vectors(m=8, n=6, seed=3)
    probe = gram_of(correct, scores)
    given = (probe.gram, probe.num_samples, probe.num_correct, 4)
    passk, named = estimate_conflict(*given), estimate_conflict(*given, weighting=named_weighting("passk:4"))
    for name in ("status", "cosine", "ci_low", "ci_high", "inner_product", "naive_cosine", "frac_negative_pairs"):
        assert getattr(named, name) == getattr(passk, name), name
    assert torch.equal(named.weighted_agreement, passk.weighted_agreement)
    assert (named.curve, named.k_star, named.mean_weight) == (None, None, None)


@pytest.mark.parametrize("spec", ["grpo", "maxrl", "rs_grpo:beta=2"])
def test_a_weighting_is_measured_on_the_advantages_it_gives(spec):
    correct, scores = score_vectors(m=8, n=6, seed=3)
    probe = gram_of(correct, scores)
    baseline = correct.mean(1, keepdim=True)
    scale = {
        "grpo": 1 / (correct.std(1, keepdim=True) + 1e-4),
        "maxrl": 1 / baseline,
        "rs_grpo:beta=2": (math.exp(2) - 1) / 2 / (1 + (math.exp(2) - 1) * baseline),
    }[spec]
    advantages = ((correct - baseline) * scale).nan_to_num(0.0)
    left, right = (advantages[..., None] * scores).mean(1), gradients(correct, scores, 1)
    pairs = list(itertools.permutations(range(8), 2))
    moments = [
        sum(float(a[i] @ b[j]) for i, j in pairs) / len(pairs) for a, b in ((left, right), (right, right), (left, left))
    ]
    found = estimate_conflict(probe.gram, probe.num_samples, probe.num_correct, 4, weighting=named_weighting(spec))
    assert [found.inner_product, found.norm1_sq, found.normk_sq] == pytest.approx(moments, rel=1e-9)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_kernel_and_its_sums_are_those_of_whole_matrices(rows, monkeypatch):
    monkeypatch.setattr("passk_guard.estimation.ustatistics._ROWS", rows)
    generator = torch.Generator().manual_seed(5)
    m = 11
    sums = torch.randn(2 * m, 6, generator=generator, dtype=torch.float64)
    left, right = torch.randn(2, 2 * m, generator=generator, dtype=torch.float64)
    probe = ProbeGram(sums @ sums.T, torch.full((m,), 8), torch.full((m,), 4))
    g, h = ((c[:, None] * sums).view(2, m, 6).sum(0) for c in (left, right))
    torch.testing.assert_close(prompt_kernel(probe, left, right), g @ h.T, rtol=1e-12, atol=1e-12)
    expected = (g @ h.T).fill_diagonal_(0).sum(1)
    torch.testing.assert_close(other_prompt_sums(probe, left, right), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_overshoot_by_blocks_of_rows_is_that_of_whole_kernels(rows, monkeypatch):
    monkeypatch.setattr("passk_guard.estimation.ustatistics._ROWS", rows)
    generator, m = torch.Generator().manual_seed(6), 11
    sums = torch.randn(2 * m, 6, generator=generator, dtype=torch.float64)
    probe = ProbeGram(sums @ sums.T, torch.full((m,), 8), torch.randint(1, 8, (m,), generator=generator))
    one, many = coefficients(probe, torch.tensor([1, 4]))
    mixed = prompt_kernel(probe, many, one)
    kernels = torch.stack([(mixed + mixed.T) / 2, prompt_kernel(probe, one, one), prompt_kernel(probe, many, many)])
    found = refresh_moments(probe, passk_rows(torch.tensor([4]))).overshoots[:, 0]
    torch.testing.assert_close(found, jackknife_overshoot(kernels), rtol=1e-10, atol=0)
