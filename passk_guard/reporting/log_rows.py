"""Putting the guard's numbers on the same log row as the loss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from passk_guard.reporting.metrics import Metrics, log_row
from passk_guard.utils.patching import MethodPatch
from passk_guard.utils.text import describe_error

logger = logging.getLogger(__name__)


class LogRows:
    """Adds the newest metrics to the next row the trainer logs with a loss.

    The row is completed inside `trainer.log`: what a callback changes in on_log reaches neither log_history nor
    the trackers. Each refresh is reported once.

    Args:
        trainer: a transformers Trainer or one of its children.
        since_last: asked at each row for the numbers of the steps since the one before.

    Raises:
        GuardError: from `install`, when another guard is installed on this trainer.
    """

    def __init__(self, trainer: Any, since_last: Callable[[], Metrics] = dict) -> None:
        self._since_last = since_last
        self._waiting: dict[str, float] = {}
        self._told = False
        self._patch = MethodPatch(trainer, "log", self._complete, owner="passk_guard.LogRows")

    def put(self, metrics: Metrics) -> None:
        """Numbers for the next row; newer ones replace older ones of the same refresh cycle."""
        self._waiting = log_row(metrics)

    def install(self) -> None:
        """Start completing rows."""
        self._patch.install()

    def remove(self) -> None:
        """Give the trainer its own `log` back."""
        self._patch.remove()

    def _complete(self, original: Callable[..., None]) -> Callable[..., None]:
        def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                logs = {**logs, **self._waiting, **self._newest()}
                self._waiting = {}
            return original(logs, *args, **kwargs)

        return log

    def _newest(self) -> dict[str, float]:
        try:
            return log_row(self._since_last())
        except Exception as error:
            if not self._told:
                self._told = True
                logger.warning("passk_guard: numbers of the last steps are missing: %s", describe_error(error))
            return {}
