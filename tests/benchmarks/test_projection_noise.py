"""What the benchmark of the noise in the protected direction claims, at a size of a second."""

import pytest
import torch

from benchmarks.projection_noise import RULES, Task, closed_form, one_step, train


@pytest.mark.parametrize(("ratio", "kept"), [(10.0, 0.20), (1.0, -0.01), (0.3, -0.22), (0.1, -0.28)])
def test_the_closed_form_is_what_a_projection_on_a_noisy_direction_keeps(ratio, kept):
    found = one_step(ratio, -0.3, 200, torch.Generator().manual_seed(0))
    assert closed_form(ratio, -0.3) == pytest.approx(kept, abs=0.006)
    assert found["hard"][0] == pytest.approx(closed_form(ratio, -0.3), abs=0.003)
    assert found["shrunk"][2] <= min(found["hard"][2], found["none"][2]) + 1e-3, "nearest to the true projection"
    assert found["shrunk"][0] <= found["hard"][0] + 1e-3, "and protects least"


def test_shrinking_protects_less_of_pass_at_1():
    task = Task(8, spread=4.0)
    found = {name: train(task, RULES[name], 24)[0] for name in ("none", "hard", "shrunk")}
    assert float((found["hard"] - found["shrunk"]).mean()) > 0.005
    assert float((found["hard"] - found["none"]).mean()) > 0.01
