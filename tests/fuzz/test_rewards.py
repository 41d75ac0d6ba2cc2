"""Whatever a reward function returns or raises: a verdict for each sample, or a failed refresh with its reason."""

import decimal
import fractions
import math

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from passk_guard.probe.verifier import Verifier
from passk_guard.utils.errors import FailedRefresh
from tests.fuzz.strategies import JSON_VALUE, NUMBER, ODD_TEXT, SCALAR
from tests.probe.test_verifier import rollouts

SPECIAL = [1j, [1.0], {}, torch.tensor(1.0), torch.zeros(2), np.float64(math.nan), np.array([1.0])]
SPECIAL += [fractions.Fraction(1, 3), decimal.Decimal("sNaN"), decimal.Decimal("0.3")]
REWARD = st.one_of(NUMBER, SCALAR, st.sampled_from(SPECIAL))
RESULT = st.one_of(
    st.lists(REWARD, max_size=4),
    st.lists(REWARD, min_size=3, max_size=3),
    st.lists(REWARD, max_size=5).map(iter),
    st.lists(st.floats(), min_size=3, max_size=3).map(torch.tensor),
    st.sets(st.floats(0, 1), min_size=3, max_size=3),
    JSON_VALUE,
    st.sampled_from([torch.zeros(3, 2), torch.zeros(3, 1), torch.tensor(1.0), np.zeros((3, 0)), b"abc"]),
)
ERROR = st.sampled_from([ValueError("%s\n\x1b[31m"), KeyError(), SystemExit("x"), RecursionError()])


def score(function, count=3):
    """The verdicts, checked, or the reason of the failed refresh."""
    try:
        outcomes = Verifier(function).score(rollouts([str(i) for i in range(count)]))
    except FailedRefresh as failed:
        reason = str(failed)
        assert "\n" not in reason
        assert "\x1b" not in reason
        return reason
    assert outcomes.correct.shape == (count,)
    assert set(outcomes.correct.tolist()) <= {-1, 0, 1}
    assert "\n" not in (outcomes.reason or "")
    return outcomes.correct.tolist()


@given(RESULT, st.one_of(ODD_TEXT, st.just("right")))
@example({0.1, 0.2, 1.0}, "right")
@example(5, "a%sb%d")
def test_any_value(result, name):
    def function(completions):
        return result

    function.__name__ = name
    found = score(function)
    if isinstance(found, str) or not isinstance(result, list):
        assert not isinstance(result, (set, bytes, dict, str)) or isinstance(found, str)
        return
    for reward, verdict in zip(result, found, strict=True):
        value = math.nan if reward is None else float(reward)
        # Rewards are compared in float32, as TRL keeps them.
        near = math.isclose(value, 1.0, rel_tol=1e-6)
        assert near or verdict == (-1 if math.isnan(value) else int(value >= 1.0))


@given(st.lists(st.one_of(REWARD, ERROR), min_size=3, max_size=3), st.booleans())
def test_one_sample_at_a_time_after_an_error(results, later):
    def function(completions):
        if len(completions) > 1:
            raise ValueError("all at once")
        result = results[int(completions[0])]
        if isinstance(result, BaseException):
            raise result
        return [result]

    async def asynchronous(completions):
        return function(completions)

    found = score(asynchronous if later else function)
    if isinstance(found, list):
        pairs = zip(results, found, strict=True)
        assert all(verdict == -1 for result, verdict in pairs if isinstance(result, BaseException))


@given(st.dictionaries(st.one_of(ODD_TEXT, st.text(max_size=4)), JSON_VALUE, max_size=4))
def test_any_columns(columns):
    rows = [{"prompt": "p", **columns}] * 2
    outcomes = Verifier(lambda **_: [1.0, 0.0]).score(rollouts(["a", "b"], rows=rows))
    assert outcomes.correct.tolist() == [1, 0]
