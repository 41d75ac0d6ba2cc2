"""What a guarded run under DeepSpeed is compared with: one process of plain PyTorch."""

from functools import cache

import pytest

from tests.mitigation.engines import oracle
from tests.mitigation.engines.deepspeed_cases import CASES


@cache
def reference(recipe):
    """Final weights by name, and the history, of one process."""
    model, history = oracle.train(recipe)
    return oracle.weights(model), history


@cache
def beginning(recipe):
    return oracle.weights(oracle.build_model(recipe))


def recipe_of(name, ranks, **changes):
    return oracle.Recipe(**({"ranks": ranks} | CASES[name][0] | changes))


def error_of(weights, recipe):
    return oracle.relative_error(weights, reference(recipe)[0], beginning(recipe))


def check_run(ranks, name, tolerance):
    recipe = recipe_of(name, len(ranks))
    expected = reference(recipe)[1]
    first = ranks[0]
    assert error_of(first["weights"], recipe) < tolerance
    assert error_of(first["plain"], recipe) > 0.1  # the edit matters
    assert len({rank["digest"] for rank in ranks}) == 1
    for rank in ranks:
        assert rank["probe_leaves_no_trace"]
        assert rank["history"] == first["history"]  # all ranks took the same decisions
        assert len(rank["history"]) == recipe.steps
        check_history(rank["history"], expected, 10 * tolerance)


def check_history(history, expected, tolerance):
    """Inner products of the gradient and the probe gradient: unlike the edit they show a scaled probe gradient."""
    for found, wanted in zip(history, expected, strict=True):
        scale = (wanted["gg"] * wanted["pp"]) ** 0.5
        assert abs(found["gp"] - wanted["gp"]) < tolerance * scale
        assert found["gg"] == pytest.approx(wanted["gg"], rel=tolerance)
        assert found["pp"] == pytest.approx(wanted["pp"], rel=tolerance)
