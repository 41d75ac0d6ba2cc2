"""Telling must not stop what is told of: a report that fails is one line in the log, and training goes on."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import Once, describe_error

logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., None])
_TOLD = "_told_of"


def quietly(method: Method) -> Method:
    """Of a method: its exceptions, but for a GuardError, are logged once each for an object and go no further.

    Not even the log is relied on: a handler of the user's, which sends lines elsewhere, may be what fails.
    """

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            method(self, *args, **kwargs)
        except GuardError:
            raise
        except Exception as error:
            reason = f"{method.__name__}: {describe_error(error)}"
            told: Once = vars(self).setdefault(_TOLD, Once())
            if told.new(reason):
                with suppress(Exception):
                    logger.warning("passk_guard: part of a report is missing (%s)", reason)

    return cast(Method, guarded)
