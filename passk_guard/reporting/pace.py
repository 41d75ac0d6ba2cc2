"""How long a training step takes, between refreshes and without them."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Seconds of a step, from the end of one refresh to the beginning of the next.

    Args:
        clock: seconds of any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since: tuple[int, float] | None = None

    def forget(self) -> None:
        """What happens from here on is no training: a run that begins, or a refresh of unknown length."""
        self._since = None

    def arrive(self, step: int, probe_seconds: float | None) -> float | None:
        """Seconds a step since `leave`, less the refresh that has just taken `probe_seconds`; None where unknown."""
        if self._since is None or probe_seconds is None or step <= self._since[0]:
            return None
        return max(0.0, self._clock() - self._since[1] - probe_seconds) / (step - self._since[0])

    def leave(self, step: int) -> None:
        """A refresh before this step is over."""
        self._since = step, self._clock()
