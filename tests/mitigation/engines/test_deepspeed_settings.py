"""DeepSpeed engines under other settings, sizes and precisions; a file that another process of the tests can take."""

import pytest

from tests.mitigation.engines import oracle
from tests.mitigation.engines.deepspeed_cases import HARD, OVERFLOWING, ROUNDED, UNEVEN
from tests.mitigation.engines.deepspeed_checks import check_run, error_of, recipe_of


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", HARD)
def test_so_it_does_under_every_other_setting(launched, name):
    check_run(launched("hard", name), name, 1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("name", UNEVEN)
def test_so_it_does_where_no_size_divides_by_the_ranks(launched, name):
    check_run(launched("uneven", name, ranks=3), name, 1e-6)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ROUNDED)
def test_in_half_precision_the_guard_adds_no_error_of_its_own(launched, name):
    ranks = launched("rounded", name, "rounded,overflow")
    recipe = recipe_of(name, len(ranks))
    unguarded = oracle.Recipe(**{**vars(recipe), "gamma": None})
    noise = error_of(ranks[0]["plain"], unguarded)
    assert error_of(ranks[0]["weights"], recipe) < max(1.3 * noise, 1e-3)
    assert noise < 0.1
    assert all(rank["probe_leaves_no_trace"] for rank in ranks)
    assert len({rank["digest"] for rank in ranks}) == 1


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", OVERFLOWING)
def test_overflowing_steps_and_the_loss_scale_stay_as_they_were(launched, name):
    for rank in launched("overflow", name, "rounded,overflow"):
        assert rank["guarded"] == rank["plain"]
        assert 0 < rank["plain"][1] < 8  # some steps were skipped


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_in_grpo_the_edit_reaches_the_optimizer(launched, name):
    for rank in launched("grpo", name):
        assert rank["nothing"] == rank["plain"] != rank["start"]
        assert rank["pushed"] != rank["plain"]
        assert min(rank["norms"]) > 0.0
        assert rank["erased"] == rank["start"]
