"""Inner products survive the projection: unbiased over seeds, with errors that fit the dimension."""

import pytest
import torch

from passk_guard.sketch import ScoreSketcher
from passk_guard.sketch.kronecker import is_vocabulary, split_dim
from passk_guard.sketch.projections import generator_for, random_signs, sample_side
from tests.helpers.tiny import tiny_model
from tests.sketch.oracle import oracle_sketch, ragged_batch, relative_error

METHODS = ["kronecker", "countsketch"]
SEEDS = 60


def grams_over_seeds(model, batch, method, dim, num_slots=6):
    sketcher, grams = ScoreSketcher(model, dim=dim, method=method), []
    for seed in range(SEEDS):
        sketcher.reseed(seed)
        rows = sketcher.sketch(**batch, num_slots=num_slots).double()
        grams.append(rows @ rows.T)
    return torch.stack(grams)


def standard_errors_off(grams, expected):
    """|mean over seeds - expected| in standard errors of that mean, elementwise."""
    return (grams.mean(0) - expected).abs() / (grams.std(0) / len(grams) ** 0.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_inner_products_are_unbiased(kind, method):
    model, batch = tiny_model(kind), ragged_batch()
    exact = oracle_sketch(model, batch, 6).double()
    grams = grams_over_seeds(model, batch, method, dim=256)
    assert float(standard_errors_off(grams, exact @ exact.T).max()) < 5


def test_inner_products_are_unbiased_with_a_hashed_vocabulary():
    model, batch = tiny_model("llama", vocab_size=200), ragged_batch(vocab=200)
    a, b = split_dim(200, 16, 64)
    assert a * b > 64
    exact = oracle_sketch(model, batch, 6).double()
    grams = grams_over_seeds(model, batch, "kronecker", dim=64)
    assert float(standard_errors_off(grams, exact @ exact.T).max()) < 5


@pytest.mark.parametrize("method", METHODS)
def test_the_two_uses_of_a_tied_weight_add_as_vectors(method):
    """Fails if the embedding and the head of a tied weight are projected apart."""

    def gram(tied):
        model = tiny_model("gpt2", tie_word_embeddings=tied)
        model.load_state_dict(tiny_model("gpt2").state_dict())
        for name, p in model.named_parameters():
            p.requires_grad_("wte" in name or "lm_head" in name)
        rows = oracle_sketch(model, batch, 6).double()
        return model, rows @ rows.T

    batch = ragged_batch(vocab=6)  # few tokens: those read are those written
    (model, together), (_, apart) = gram(tied=True), gram(tied=False)
    grams = grams_over_seeds(model, batch, method, dim=1024)
    assert float(standard_errors_off(grams, together).max()) < 5
    assert float(standard_errors_off(grams, apart).max()) > 10  # the test can tell the two apart


@pytest.mark.parametrize(("method", "factor"), [("kronecker", 6.0), ("countsketch", 1.5)])
@pytest.mark.parametrize("dim", [256, 1024])
def test_errors_of_cosines_fit_the_dimension(method, factor, dim):
    """k_eff = 1/(rms cosine error)^2 is the dimension for countsketch, and a fraction of it for kronecker."""
    model, batch = tiny_model("qwen2"), ragged_batch()
    exact = torch.nn.functional.normalize(oracle_sketch(model, batch, 6).double(), dim=1)
    grams = grams_over_seeds(model, batch, method, dim)
    norms = grams.diagonal(dim1=1, dim2=2).sqrt()
    cosines = grams / (norms[:, :, None] * norms[:, None, :])
    above = torch.triu_indices(6, 6, 1)
    k_eff = 1 / float((cosines - exact @ exact.T)[:, above[0], above[1]].square().mean())
    assert dim / factor < k_eff


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_over_pairs_errs_more_than_independent_errors_would(method):
    """Pairs share one projection: Cov(e_ij, e_kl) = (c_ik c_jl + c_il c_jk) / dim, c being the vectors' cosines."""
    model, batch = tiny_model("qwen2"), ragged_batch()
    exact = oracle_sketch(model, batch, 6).double()
    mix = (torch.eye(6) + 0.35).double() / exact.norm(dim=1)  # vectors that have a direction in common
    unit = mix @ exact
    length = unit.norm(dim=1)
    cosine = unit @ unit.T / length[:, None] / length
    i, j = torch.triu_indices(6, 6, 1)
    expected = cosine[i][:, i] * cosine[j][:, j] + cosine[i][:, j] * cosine[j][:, i]
    errors = (mix @ grams_over_seeds(model, batch, method, 256) @ mix.T / length[:, None] / length - cosine)[:, i, j]
    ratio = float((errors.mean(1).square().mean() * len(i) / errors.square().mean()).sqrt())
    assert ratio == pytest.approx(float((expected.sum() / expected.diagonal().sum()).sqrt()), rel=0.3)
    assert ratio > 1.4


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_the_same_sketch_and_another_seed_another(method):
    model, batch = tiny_model("qwen2"), ragged_batch()
    first, second = (ScoreSketcher(model, dim=64, method=method, seed=5) for _ in range(2))
    torch.manual_seed(99)  # the global random state plays no part
    rows = first.sketch(**batch, num_slots=6)
    assert torch.equal(rows, second.sketch(**batch, num_slots=6))
    second.reseed(6)
    assert not torch.allclose(rows, second.sketch(**batch, num_slots=6), rtol=0.1)
    second.reseed(5)
    assert torch.equal(rows, second.sketch(**batch, num_slots=6))


@pytest.mark.parametrize("method", [*METHODS, "identity"])
def test_batches_of_one_refresh_share_their_projections(method):
    model, batch = tiny_model("gpt2"), ragged_batch()
    sketcher = ScoreSketcher(model, dim=256, method=method)
    whole = sketcher.sketch(**batch, num_slots=6)
    parts = sum(sketcher.sketch(**{n: t[i : i + 2] for n, t in batch.items()}, num_slots=6) for i in (0, 2, 4))
    assert relative_error(parts, whole) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_sketching_is_linear_in_the_exact_gradient(method, monkeypatch):
    """Chunks of a large weight are hashed like the whole."""
    model, batch = tiny_model("qwen2"), ragged_batch()
    sketcher = ScoreSketcher(model, dim=256, method=method)
    whole = sketcher.sketch(**batch, num_slots=6)
    monkeypatch.setattr("passk_guard.sketch.accumulator._CHUNK", 100)
    monkeypatch.setattr("passk_guard.sketch.head._CHUNK_SCALARS", {"cpu": 200})
    monkeypatch.setattr("passk_guard.sketch.head._FEWEST_TOKENS", 1)
    assert relative_error(sketcher.sketch(**batch, num_slots=6), whole) < 1e-5


def test_a_side_that_fits_keeps_all_its_room():
    assert split_dim(8, 1536, 16384) == (8, 2048)
    assert split_dim(1536, 8, 16384) == (2048, 8)
    assert split_dim(1536, 1536, 16384) == (128, 128)
    for rows, cols in [(1, 1), (3, 500), (151_936, 1536), (4096, 4096), (76, 16)]:
        for dim in (16, 36, 4096, 8192, 16384):
            a, b = split_dim(rows, cols, dim)
            assert a * b == dim or (a * b > dim and is_vocabulary(rows, cols))


@pytest.mark.parametrize(("size", "width"), [(40, 16), (48, 16), (7, 16), (16, 16), (200, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_side_is_linear_and_its_rows_are_its_action_on_unit_vectors(size, width, dtype):
    for seed in range(4):  # the shift differs
        side = sample_side(size, width, torch.Generator().manual_seed(seed), torch.ones(1, dtype=dtype))
        eye = torch.eye(size, dtype=dtype)
        assert torch.equal(side(eye), side.rows(torch.arange(size)))
        assert side(eye).abs().sum(1).unique().tolist() == [1]
        per_column = side(eye).abs().sum(0)
        assert float(per_column.max()) <= -(-size // width)
        x = torch.randn(3, 5, size).to(dtype)
        assert side(x).dtype == dtype
        loose = {"rtol": 0.02, "atol": 0.1} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(side(x), x @ side(eye), **loose)
        if size <= width:
            assert torch.equal(side(eye) @ side(eye).T, eye)


def test_a_large_side_in_bf16_is_added_up_in_fp32(monkeypatch):
    """Hundreds of terms to a column: adding them up in bf16 would lose most of them."""
    side = sample_side(4096, 4, torch.Generator().manual_seed(0), torch.ones(1, dtype=torch.bfloat16))
    x = side.signs * torch.ones(2, 4096, dtype=torch.bfloat16)
    for largest in (1 << 23, 0):  # as a product with the matrix, and folded
        monkeypatch.setattr("passk_guard.sketch.projections._LARGEST_MATRIX", largest)
        assert torch.equal(side(x), torch.full((2, 4), 1024.0, dtype=torch.bfloat16))


def test_both_ways_to_apply_a_side_are_the_same_projection(monkeypatch):
    side = sample_side(300, 16, torch.Generator().manual_seed(0), torch.ones(1, dtype=torch.bfloat16))
    x = torch.randint(-3, 4, (5, 300)).bfloat16()  # sums of small integers are exact
    product = side(x)
    monkeypatch.setattr("passk_guard.sketch.projections._LARGEST_MATRIX", 0)
    assert torch.equal(side(x), product)


def test_shifts_differ_between_parameters():
    """Or a coordinate that is large in every layer would meet itself in one column of the sketch."""
    shifts = {sample_side(64, 16, generator_for(0, f"layer{i}", "left"), torch.ones(1)).shift for i in range(40)}
    assert len(shifts) > 8


def test_signs_are_balanced_and_belong_to_the_name():
    signs = random_signs((300, 41), generator_for(0, "weight", "left"))
    assert signs.shape == (300, 41)
    assert set(signs.unique().tolist()) == {-1, 1}
    assert abs(float(signs.float().mean())) < 5 / signs.numel() ** 0.5
    assert torch.equal(signs, random_signs((300, 41), generator_for(0, "weight", "left")))
    for other in (generator_for(1, "weight", "left"), generator_for(0, "weights", "left")):
        agreement = float((signs == random_signs((300, 41), other)).float().mean())
        assert abs(agreement - 0.5) < 5 / signs.numel() ** 0.5
