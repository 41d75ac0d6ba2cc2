"""Whatever a reward function returns or raises: a verdict for each sample, or a failed refresh with its reason."""

import decimal
import fractions
import math

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from passk_guard.probe.verifier import Verifier
from passk_guard.utils.errors import FailedRefresh, GuardError
from tests.fuzz.strategies import JSON_VALUE, NUMBER, ODD_TEXT, SCALAR
from tests.probe.test_verifier import rollouts


class Odd:
    """An object whose methods all raise."""

    def __init__(self, error=ZeroDivisionError):
        self.error = error

    def _fail(self, *_):
        raise self.error("no")

    def _no_text(self):
        raise ZeroDivisionError

    __float__ = __iter__ = __len__ = __bool__ = __eq__ = __getitem__ = __index__ = _fail
    __repr__ = __str__ = _no_text
    __hash__ = object.__hash__


class OddError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Longer(list):
    def __len__(self):
        raise KeyError("length")


def broken_generator(error):
    yield 1.0
    raise error


REWARD = st.one_of(
    NUMBER,
    SCALAR,
    st.just(Odd()),
    st.just(Odd(SystemExit)),
    st.just(1j),
    st.just([1.0]),
    st.just({}),
    st.just(torch.tensor(1.0)),
    st.just(torch.zeros(2)),
    st.just(np.float64(math.nan)),
    st.just(np.array([1.0])),
    st.decimals(),
    st.just(fractions.Fraction(1, 3)),
    st.just(decimal.Decimal("sNaN")),
)
RESULT = st.one_of(
    st.lists(REWARD, max_size=4),
    st.lists(REWARD, min_size=3, max_size=3),
    st.lists(REWARD, min_size=3, max_size=3).map(Longer),
    st.lists(REWARD, max_size=5).map(iter),
    st.lists(st.floats(), min_size=3, max_size=3).map(torch.tensor),
    st.sets(st.floats(0, 1), min_size=3, max_size=3),
    JSON_VALUE,
    st.binary(min_size=3, max_size=3).map(bytearray),
    st.binary(min_size=3, max_size=3).map(memoryview),
    st.builds(lambda error: broken_generator(error("x")), st.sampled_from([ValueError, SystemExit, OddError])),
    st.just(torch.zeros(3, 2)),
    st.just(torch.zeros(3, 1)),
    st.just(torch.tensor(1.0)),
    st.just(np.zeros((3, 0))),
    st.just(Odd()),
    st.just(Odd(SystemExit)),
)
ERROR = st.sampled_from(
    [OddError(), ValueError("%s\n\x1b[31m"), KeyError(), SystemExit("x"), RecursionError(), OddError]
)


def named(function, name):
    function.__name__ = name
    return function


def score(function, count=3):
    """The verdicts, checked, or the reason of the void refresh."""
    try:
        outcomes = Verifier(function).score(rollouts([str(i) for i in range(count)]))
    except FailedRefresh as void:
        reason = str(void)
    else:
        return checked(outcomes, count)
    assert "\n" not in reason
    assert "\x1b" not in reason
    return reason


def checked(outcomes, count):
    assert outcomes.correct.shape == (count,)
    assert set(outcomes.correct.tolist()) <= {-1, 0, 1}
    assert "\n" not in (outcomes.reason or "")
    return outcomes.correct.tolist()


@given(RESULT, st.one_of(ODD_TEXT, st.just("right")))
@example({0.1, 0.2, 1.0}, "right")
@example(bytearray(b"abc"), "right")
@example(5, "a%sb%d")
def test_any_value(result, name):
    given_list = list(iter(result)) if isinstance(result, (list, Longer)) else None
    found = score(named(lambda completions: result, name))
    if isinstance(found, str) or given_list is None:
        assert not isinstance(result, (set, bytearray, memoryview, dict, str)) or isinstance(found, str)
        return
    for reward, verdict in zip(given_list, found, strict=True):
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
        if isinstance(result, BaseException) or result is OddError:
            raise result
        return [result]

    async def asynchronous(completions):
        return function(completions)

    found = score(asynchronous if later else function)
    failed = [isinstance(r, BaseException) or r is OddError for r in results]
    if isinstance(found, list):
        assert all(verdict == -1 for verdict, broken in zip(found, failed, strict=True) if broken)


@given(st.dictionaries(st.one_of(ODD_TEXT, st.text(max_size=4)), st.one_of(JSON_VALUE, st.just(Odd())), max_size=4))
def test_any_columns(columns):
    rows = [{"prompt": "p", **columns}] * 2
    try:
        outcomes = Verifier(lambda **_: [1.0, 0.0]).score(rollouts(["a", "b"], rows=rows))
    except FailedRefresh:
        return
    assert outcomes.correct.tolist() == [1, 0]


@given(st.one_of(SCALAR, NUMBER, JSON_VALUE), st.one_of(SCALAR, NUMBER))
def test_what_is_no_function_or_no_threshold(function, threshold):
    try:
        Verifier(function, threshold=1.0)
        raise AssertionError("accepted")
    except GuardError:
        pass
    try:
        made = Verifier(lambda completions: [1.0], threshold=threshold)
    except GuardError:
        return
    assert math.isfinite(made.threshold)
