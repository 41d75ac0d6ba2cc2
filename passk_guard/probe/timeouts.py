"""A time limit for calls of a function that may hang."""

from __future__ import annotations

import contextvars
import ctypes
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_POKE = 0.5  # seconds between attempts at a call that does not heed the first
_LONGEST = threading.TIMEOUT_MAX / 2


class Overdue(Exception):
    """The call did not return in time, or the previous call still has not."""


class _Stop(BaseException):
    """Ends a call from within; not an Exception, since the function may catch those."""


class TimeLimit:
    """Call one function, each time with the same limit, and never twice at a time.

    From the main thread the function is called there: what works in training, such as its own alarm, works here. When
    its time is up, the handler of SIGVTALRM raises an exception in it. That ends what waits in Python (sockets, locks,
    subprocesses, sleep) and what computes in Python, in `re` or in long integers. It does not end C code that neither
    returns nor checks for signals.

    From another thread, where no signal arrives, the function gets a daemon thread, which is left behind when its
    time is up. It ends at its next line of Python. No further call is made before that.

    Args:
        seconds: None or 0 for no limit: then a call is a call.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds if seconds and seconds < _LONGEST else None
        self._left: Aside[Any] | None = None

    def call(self, function: Callable[[], T]) -> T:
        """Return the function's value.

        Raises:
            Overdue: after `seconds`, or at once while a call that was left behind is running.
            Whatever the function raises.
        """
        if self.seconds is None:
            return function()
        if _interruptible():
            return _interrupted(function, self.seconds)
        if self._left is not None and self._left.running:
            raise Overdue(f"is still busy with a call that was given up after {self.seconds:g} s")
        self._left = Aside(function)
        try:
            return self._left.result(self.seconds)
        except Overdue:
            self._left.stop()
            raise


class Aside(Generic[T]):
    """A call in a daemon thread, for which not even the interpreter's exit waits, with the caller's context."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._done = threading.Event()
        self._value: T | None = None
        self._error: BaseException | None = None
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="passk-guard-call", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the call has not ended."""
        return not self._done.is_set()

    def result(self, seconds: float | None = None) -> T:
        """Wait for its value; to be called once.

        Raises:
            Overdue: the call has not ended after `seconds`.
            Whatever the function raised.
        """
        if not self._done.wait(seconds):
            raise Overdue(f"was still running after {seconds:g} s")
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # a cycle with its traceback would keep what the call held until garbage collection
        return self._value  # type: ignore[return-value]

    def stop(self) -> None:
        """Raise an exception in it, which takes effect when it next runs Python."""
        if self.running and self._thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), ctypes.py_object(_Stop))

    def _run(self) -> None:
        try:
            self._value = self._function()
        except _Stop:
            pass  # the caller has stopped waiting
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()


def raised_by_a_signal(error: BaseException) -> bool:
    """Whether a signal handler raised it, to end the process, and not the function that was running."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {getattr(getattr(handler, "__func__", handler), "__code__", None) for handler in handlers} - {None}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return True
        trace = trace.tb_next
    return False


def _interruptible() -> bool:
    here = threading.current_thread() is threading.main_thread()
    return here and hasattr(signal, "pthread_kill") and signal.getsignal(signal.SIGVTALRM) is not None


def _interrupted(function: Callable[[], T], seconds: float) -> T:
    alarm = _Alarm(seconds)
    try:
        with alarm:
            return _inside(function)
    except _Stop:
        raise Overdue(f"was still running after {seconds:g} s") from None


def _inside(function: Callable[[], T]) -> T:
    """The frame that the alarm looks for: only what runs inside it is ever interrupted."""
    return function()


class _Alarm:
    """Raise _Stop in the main thread, in a call of `_inside`, when the time is up, and again until it returns.

    A thread sends the signal, and so does a timer of the process's CPU time: no thread runs while C code computes
    without releasing the interpreter.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._over = threading.Event()

    def __enter__(self) -> None:
        self._deadline = time.monotonic() + self._seconds
        self._thread = threading.Thread(target=self._poke, name="passk-guard-alarm", daemon=True)
        self._handler = signal.signal(signal.SIGVTALRM, self._on_signal)
        try:
            self._thread.start()
        except BaseException:
            signal.signal(signal.SIGVTALRM, self._handler)
            raise
        self._timer = signal.setitimer(signal.ITIMER_VIRTUAL, self._seconds, _POKE)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        signal.setitimer(signal.ITIMER_VIRTUAL, *self._timer)
        # By default this signal ends the process: none may be on its way when the handler goes.
        while signal.SIGVTALRM in signal.sigpending():
            time.sleep(0.001)
        signal.signal(signal.SIGVTALRM, self._handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() < self._deadline:
            return
        while frame is not None:
            if frame.f_code is _inside.__code__:
                raise _Stop
            frame = frame.f_back

    def _poke(self) -> None:
        pause = self._seconds
        while not self._over.wait(pause):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGVTALRM)
            pause = _POKE
