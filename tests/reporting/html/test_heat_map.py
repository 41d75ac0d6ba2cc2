"""Pixels against a decoder that is not ours."""

import base64
import io
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from passk_guard.reporting.html.heat_map import averaged_down, colour_limit, encode_png, heat_map, signed_pixels

NAN = float("nan")


def test_a_png_decodes_to_what_was_encoded():
    pixels = torch.randint(0, 256, (7, 13, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.open(io.BytesIO(encode_png(pixels))).verify()  # checksums
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(pixels)))), pixels.numpy())


def test_colours_tell_the_sign_and_the_size():
    pixels = signed_pixels(torch.tensor([[-2.0, -1.0, 0.0, 0.5, 9.0, NAN, math.inf, -math.inf]]), 1.0)[0].tolist()
    vermillion, blue = [213, 94, 0], [0, 114, 178]
    assert pixels[0] == [*vermillion, 255]
    assert pixels[1] == [*vermillion, 255]
    assert pixels[2][3] == 0
    assert pixels[3] == [*blue, 128]
    assert pixels[4] == [*blue, 255]
    assert pixels[5][0] == pixels[5][1] == pixels[5][2]
    assert pixels[6] == [*blue, 255]
    assert pixels[7] == [*vermillion, 255]


def test_the_two_ends_stay_apart_for_the_colour_blind():
    """Vienot, Brettel and Mollon's (1999) matrices, linear RGB: the ends differ as seen with either dichromacy."""
    ends = (torch.tensor([[213.0, 94.0, 0.0], [0.0, 114.0, 178.0]]) / 255) ** 2.2
    for matrix in ([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
                   [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]):  # fmt: skip
        seen = (ends @ torch.tensor(matrix).T).clamp(0, 1) ** (1 / 2.2)
        assert float((seen[0] - seen[1]).norm()) > 0.4


def test_averages_are_those_of_the_blocks():
    matrix = torch.randn(10, 7, dtype=torch.float64)
    matrix[0, 0] = NAN
    matrix[9, 6] = NAN
    small, block = averaged_down(matrix, 4)
    assert block == 3
    for i in range(4):
        for j in range(3):
            entries = [v for row in matrix[3 * i : 3 * i + 3, 3 * j : 3 * j + 3].tolist() for v in row if v == v]
            expected = sum(entries) / len(entries) if entries else NAN
            assert small[i, j].item() == pytest.approx(expected, nan_ok=True)
    assert averaged_down(matrix, 10)[1] == 1


def test_the_limit_leaves_out_the_diagonal_and_what_is_silent():
    matrix = torch.full((4, 4), 0.0)
    matrix[0, 1] = -2.0
    matrix[1, 2] = NAN
    matrix.fill_diagonal_(100.0)
    assert colour_limit(matrix) == 2.0
    assert colour_limit(torch.zeros(3, 3)) == 1.0
    values = torch.arange(1, 101, dtype=torch.float64)[None, :]
    assert colour_limit(values) == 98.0


def image_of(markup):
    data = re.search(r'href="data:image/png;base64,([^"]*)"', markup)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_a_small_matrix_is_shown_entry_by_entry_and_a_large_one_in_means():
    matrix = torch.tensor([[5.0, -1.0], [1.0, 5.0]])
    small = heat_map(matrix, alt="a", title="t")
    assert np.array_equal(image_of(small), signed_pixels(matrix, 1.0).numpy())
    assert 'class="crisp"' in small
    assert "50% of the cells lie beyond" in small
    large = heat_map(torch.randn(1000, 1000), alt="a")
    assert image_of(large).shape == (334, 334, 4)
    assert "Each cell is the mean of 3 x 3 entries" in large
    assert len(large) < 600_000
