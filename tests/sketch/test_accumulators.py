"""The sketching methods on the factors of one weight gradient, for each shape that they treat differently."""

import pytest
import torch

from passk_guard.sketch.accumulator import CountSketchAccumulator, IdentityAccumulator, Projections, lay_out
from passk_guard.sketch.kronecker import KroneckerAccumulator

SQUARE, VOCABULARY, LORA_DOWN, LORA_UP = (24, 24), (200, 24), (3, 40), (40, 3)
LAYOUT = lay_out(torch.tensor([-1, 0, 0, 1]))
DIM = 64


def empty(method, shape, seed=0, name="w", layout=LAYOUT):
    width = shape[0] * shape[1] if method is IdentityAccumulator else DIM
    rows = torch.zeros(len(layout.groups), width, dtype=torch.float64)
    return method(rows, layout, {name: shape}, Projections(seed))


def folded(accumulator):
    sketch = torch.zeros(2, accumulator.rows.shape[1], dtype=torch.float64)
    accumulator.fold_into(sketch)
    return sketch


def sketch_of(method, left, right, seed=0):
    accumulator = empty(method, (left.shape[-1], right.shape[-1]), seed)
    factors = (accumulator.project("w", side, x) for side, x in (("left", left), ("right", right)))
    accumulator.add_matrix("w", *factors)
    return folded(accumulator)


def factors(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(4, 5, size, generator=generator, dtype=torch.float64) for size in shape)


@pytest.mark.parametrize("shape", [SQUARE, VOCABULARY, LORA_DOWN, LORA_UP])
def test_identity_forms_the_gradient_of_each_slot(shape):
    left, right = factors(shape)
    per_sample = torch.einsum("bto,bti->boi", left, right).flatten(1)
    expected = torch.stack([per_sample[1] + per_sample[2], per_sample[3]])
    torch.testing.assert_close(sketch_of(IdentityAccumulator, left, right), expected)


@pytest.mark.parametrize("method", [IdentityAccumulator, KroneckerAccumulator, CountSketchAccumulator])
@pytest.mark.parametrize("shape", [SQUARE, VOCABULARY, LORA_DOWN, LORA_UP])
def test_a_lookup_is_a_product_with_one_hot_vectors(shape, method):
    """So that an embedding and a head can share one weight."""
    ids = torch.randint(shape[0], (4, 5), generator=torch.Generator().manual_seed(1))
    right = factors(shape)[1]
    accumulator = empty(method, shape)
    accumulator.add_rows("w", ids, accumulator.project("w", "right", right))
    one_hot = torch.nn.functional.one_hot(ids, shape[0]).double()
    torch.testing.assert_close(folded(accumulator), sketch_of(method, one_hot, right))


@pytest.mark.parametrize("method", [IdentityAccumulator, KroneckerAccumulator, CountSketchAccumulator])
@pytest.mark.parametrize("shape", [SQUARE, VOCABULARY, LORA_DOWN, LORA_UP])
def test_tokens_in_a_row_and_in_parts_add_up_to_the_samples(shape, method):
    """Sample 0 counts nowhere, 1 and 2 are of the first group; the second part begins in the middle of it."""
    left, right = factors(shape)
    accumulator = empty(method, shape)
    left, right = (accumulator.project("w", s, x).flatten(0, 1) for s, x in (("left", left), ("right", right)))
    accumulator.add_tokens("w", left[:8], right[:8], [(0, 5, 8)])
    accumulator.add_tokens("w", left[8:], right[8:], [(0, 0, 7), (1, 7, 12)])
    torch.testing.assert_close(folded(accumulator), sketch_of(method, *factors(shape)))


@pytest.mark.parametrize("method", [KroneckerAccumulator, CountSketchAccumulator])
@pytest.mark.parametrize("shape", [SQUARE, VOCABULARY, LORA_DOWN, LORA_UP])
def test_inner_products_are_unbiased(shape, method):
    left, right = factors(shape)
    exact = sketch_of(IdentityAccumulator, left, right)
    rows = [sketch_of(method, left, right, seed) for seed in range(300)]
    grams = torch.stack([r @ r.T for r in rows])
    off = (grams.mean(0) - exact @ exact.T).abs() / (grams.std(0) / 300**0.5)
    assert float(off.max()) < 5


@pytest.mark.parametrize("method", [KroneckerAccumulator, CountSketchAccumulator])
def test_different_parameters_do_not_mix_in_expectation(method):
    left, right = factors(SQUARE)
    products = []
    for seed in range(300):
        sketches = []
        for name in ("first", "second"):
            accumulator = empty(method, SQUARE, seed, name)
            sides = (accumulator.project(name, side, x) for side, x in (("left", left), ("right", right)))
            accumulator.add_matrix(name, *sides)
            sketches.append(folded(accumulator)[0])
        products.append(sketches[0] @ sketches[1])
    values = torch.stack(products)
    assert abs(float(values.mean())) < 5 * float(values.std()) / 300**0.5


@pytest.mark.parametrize("slots", [[-1, -1, 0, 1], [0, 0, 1, 1], [-1, 0, 0, 0], [0, 0, 0, 1], [-1, -1, -1, -1]])
@pytest.mark.parametrize("shape", [SQUARE, VOCABULARY, LORA_DOWN, LORA_UP])
def test_groups_multiplied_at_once_are_those_multiplied_one_by_one(shape, slots):
    """Groups of one size go into one product; the sum over a group's samples is that of samples taken alone."""
    left, right = factors(shape)
    vector = torch.randn(4, shape[0], generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def sketch(layout):
        accumulator = empty(KroneckerAccumulator, shape, layout=layout)
        accumulator.add_matrix("w", accumulator.project("w", "left", left), accumulator.project("w", "right", right))
        accumulator.add_vector("w", vector)
        found = torch.zeros(4, DIM, dtype=torch.float64)
        accumulator.fold_into(found)
        return found

    alone = sketch(lay_out(torch.arange(4)))
    expected = torch.zeros(4, DIM, dtype=torch.float64)
    for sample, slot in enumerate(slots):
        if slot >= 0:
            expected[slot] += alone[sample]
    torch.testing.assert_close(sketch(lay_out(torch.tensor(slots))), expected)
