"""A call that hangs is ended, and one that does not hang is not affected."""

import asyncio
import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from passk_guard.probe.timeouts import Overdue, TimeLimit, raised_by_a_signal
from passk_guard.probe.verifier import Verifier
from passk_guard.utils.errors import FailedRefresh
from tests.probe.test_verifier import rollouts

LIMIT = 0.3


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def sleeps():
    time.sleep(60)


def waits_for_a_lock():
    threading.Event().wait()


def waits_for_a_process():
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], check=True)


def computes():
    while True:
        pass


def computes_and_catches_everything():
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            sum(range(1000))


def backtracks():
    """Held up in C, without letting any other thread run."""
    re.match(r"(a*)*$", "a" * 40 + "b")


def waits_for_a_pool():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(time.sleep, 4).result()


HANGS = [sleeps, waits_for_a_lock, waits_for_a_process, computes, computes_and_catches_everything]


@pytest.mark.parametrize("hang", [*HANGS, backtracks])
def test_a_call_in_the_main_thread_is_interrupted(hang):
    limit = TimeLimit(LIMIT)
    handler, began = signal.getsignal(signal.SIGVTALRM), time.monotonic()
    with pytest.raises(Overdue, match=r"still running after 0.3 s"):
        limit.call(hang)
    assert time.monotonic() - began < 45
    assert limit.call(lambda: 7) == 7, "the next call is made"
    assert signal.getsignal(signal.SIGVTALRM) is handler
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert not [t for t in threading.enumerate() if t.name == "passk-guard-alarm"]


def test_the_end_of_a_call_is_never_interrupted(monkeypatch):
    """The signal also comes while the alarm is put away. Nothing is raised outside of the call."""
    monkeypatch.setattr("passk_guard.probe.timeouts._POKE", 0.0001)
    for _ in range(30):
        with pytest.raises(Overdue):
            TimeLimit(0.005).call(computes)
        assert not [t for t in threading.enumerate() if t.name == "passk-guard-alarm"]
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL


def test_a_call_that_waits_again_while_it_ends_is_interrupted_again():
    began = time.monotonic()
    with pytest.raises(Overdue):
        TimeLimit(LIMIT).call(waits_for_a_pool)
    assert time.monotonic() - began < 3.5


def elsewhere(function):
    """Call it in a thread that is not the main one, as some launchers run training."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.mark.parametrize("hang", [sleeps, computes])
def test_a_call_in_another_thread_is_left_behind(hang):
    limit, began = TimeLimit(LIMIT), time.monotonic()
    with pytest.raises(Overdue):
        elsewhere(lambda: limit.call(hang))
    assert time.monotonic() - began < 45
    if hang is computes:
        wait_until(lambda: not limit._left.running)  # it uses no more processor time


def test_a_call_left_behind_is_not_joined_by_a_second_one():
    release, calls = threading.Event(), []

    def stubborn():
        calls.append(1)
        if len(calls) == 1:
            release.wait()
        return len(calls)

    limit = TimeLimit(LIMIT)
    for words in ("still running after", "still busy with a call that was given up"):
        with pytest.raises(Overdue, match=words):
            elsewhere(lambda: limit.call(stubborn))
    assert calls == [1]
    release.set()
    wait_until(lambda: not limit._left.running)
    assert elsewhere(lambda: limit.call(stubborn)) == 2


def own_alarm():
    """Use SIGALRM as math_verify does, which only the main thread may do."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(1)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    return threading.current_thread()


def database():
    connection = sqlite3.connect(":memory:")
    return lambda: connection.execute("select 1").fetchone()


@pytest.mark.parametrize("seconds", [None, 0, 60.0, 1e300])
def test_a_call_that_does_not_hang(seconds):
    limit = TimeLimit(seconds)
    assert limit.call(own_alarm) is threading.main_thread()
    assert limit.call(database()) == (1,)
    with pytest.raises(KeyError):
        limit.call(lambda: {}[1])


def test_a_signal_for_the_run_is_handled_while_the_call_waits():
    """The user's handler runs at once, and what it raises ends the run."""

    def handler(number, frame):
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        began = time.monotonic()
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(SystemExit) as error:
            Verifier(lambda completions, **_: time.sleep(30), timeout=20).score(rollouts(["a", "b"]))
        assert time.monotonic() - began < 45
        assert raised_by_a_signal(error.value)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_function_that_asks_to_exit_is_a_failure_and_not_the_end_of_training():
    def runs_what_the_model_wrote(completions, **_):
        for completion in completions:
            exec(completion, {})
        return [1.0] * len(completions)

    outcomes = Verifier(runs_what_the_model_wrote).score(
        rollouts(["x = 1", "raise SystemExit(1)", "import sys; sys.exit()"])
    )
    assert outcomes.correct.tolist() == [1, -1, -1]
    assert outcomes.failures == 2

    async def later(completions, **_):
        raise SystemExit(1)

    with pytest.raises(FailedRefresh, match="SystemExit"):
        Verifier(later).score(rollouts(["a"]))


def test_a_coroutine_that_hangs_is_cancelled():
    cancelled = []

    async def waits(completions, **_):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(1)
            raise

    with pytest.raises(FailedRefresh, match="`waits` was still running after"):
        Verifier(waits, timeout=LIMIT).score(rollouts(["a"]))
    wait_until(lambda: cancelled)


def test_the_limit_is_for_all_calls_of_one_refresh_together():
    def raises_late(completions, **_):
        time.sleep(0.1)
        raise ValueError

    began = time.monotonic()
    with pytest.raises(FailedRefresh, match="still running"):
        Verifier(raises_late, timeout=LIMIT).score(rollouts(["a"] * 100))
    assert time.monotonic() - began < 5


def test_the_interpreter_does_not_wait_for_a_coroutine_that_hangs():
    """Threads of concurrent.futures are joined at exit."""
    script = """
import threading
from passk_guard.probe.verifier import Verifier
from tests.probe.test_verifier import rollouts
async def blocks(completions, **_):
    threading.Event().wait()
try:
    Verifier(blocks, timeout=0.2).score(rollouts(["a"]))
except Exception as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "still running after 0.2 s" in done.stdout, done.stderr


@pytest.mark.parametrize("rewards", [iter(int, 1), (1.0 for _ in range(10**12)), [10**400, 1.0]])
def test_rewards_without_end(rewards):
    with pytest.raises(FailedRefresh, match="expected a list of 2"):
        Verifier(lambda completions, **_: rewards).score(rollouts(["a", "b"]))
