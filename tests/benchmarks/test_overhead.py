"""The benchmark of the budget in time, on a shape smaller than its own; `python -m benchmarks.overhead` prints all."""

import pytest

from benchmarks import overhead
from benchmarks.observe_cost import random_model
from passk_guard.callback.budget import FORWARD, SAMPLING, TRAINING


@pytest.mark.slow
def test_a_small_shape_and_its_cadence(tmp_path):
    size, step, refresh, cadence = overhead.measure(random_model(tmp_path), overhead.shape(32, 4), refreshes=1)
    assert size == 16
    assert refresh > step > 0
    training = 32 * (TRAINING * (7 + 4) + FORWARD * 7 + SAMPLING * 4)
    each = SAMPLING + TRAINING + 2 * FORWARD  # of a completion token in a refresh; its prompt tokens may be shared
    paid = 0.1 * training * cadence
    assert 0.9 * 16 * 16 * 4 * each <= paid <= 16 * 16 * (4 + 7) * each
