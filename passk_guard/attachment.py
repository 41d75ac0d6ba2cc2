"""Which guard acts on a trainer: one, once, and for as long as it is among the trainer's callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from passk_guard.utils.errors import GuardError

_KEY = "_passk_guard_attached"


class Attachment:
    """The claim of one guard on one trainer.

    A train() that was stopped by an exception leaves the guard's methods on the trainer until the next one begins.
    Whoever takes the guard off in between must not find it at work.

    Args:
        trainer: a transformers Trainer.
        guard: a callback.
        undo: gives the trainer its methods back.
    """

    def __init__(self, trainer: Any, guard: Any, undo: Callable[[], None]) -> None:
        self._trainer, self._guard, self._undo = trainer, guard, undo
        self._listed = False

    def claim(self) -> None:
        """Become the trainer's guard, after undoing one that was taken off; a guard added twice stays once.

        Raises:
            GuardError: another guard is among the callbacks.
        """
        callbacks = self._callbacks()
        if others := [c for c in callbacks if isinstance(c, type(self._guard)) and c is not self._guard]:
            raise GuardError(
                f"Expected one {type(self._guard).__name__} on a trainer; found {len(others) + 1}. Take the others off "
                "with trainer.remove_callback, or watch several k in runs of their own."
            )
        while len(places := self._places(callbacks)) > 1:
            del callbacks[places[-1]]
        self._listed = bool(self._places(callbacks))
        before = vars(self._trainer).get(_KEY)
        if before is not None and before is not self:
            before._undo()
        setattr(self._trainer, _KEY, self)

    def release(self) -> None:
        """Leave no trace on the trainer."""
        if vars(self._trainer).get(_KEY) is self:
            delattr(self._trainer, _KEY)

    @property
    def stands(self) -> bool:
        """False once the guard was taken off; one that another callback calls was never on."""
        return not self._listed or bool(self._places(self._callbacks()))

    def _callbacks(self) -> list[Any]:
        callbacks: list[Any] = self._trainer.callback_handler.callbacks
        return callbacks

    def _places(self, callbacks: list[Any]) -> list[int]:
        return [i for i, c in enumerate(callbacks) if c is self._guard]
