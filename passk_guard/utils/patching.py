"""Replace one method of one object, with a way back."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from passk_guard.utils.errors import GuardError

Method = Callable[..., Any]
_REGISTRY = "_passk_guard_patches"
_LAYER = "_passk_guard_layer"


class MethodPatch:
    """Wraps a method on the instance only; the class and every other instance stay as they are.

    Patches may be removed in any order: one that lies under another becomes a pass-through, and goes away with the
    one above it. Usable as a context manager, and again after a removal.

    Args:
        obj: the instance.
        name: of its method.
        make_wrapper: gets the bound method as it is at `install`, and returns what to call in its place.
        owner: who patches; one owner can patch one method of one object once at a time.

    Raises:
        GuardError: `obj` has no such method; on `install`, this owner's patch of it is installed already.
    """

    def __init__(
        self, obj: Any, name: str, make_wrapper: Callable[[Method], Method], *, owner: Hashable = "passk_guard"
    ) -> None:
        if not callable(getattr(obj, name, None)):
            raise GuardError(
                f"Expected an object with a method `{name}`; found {type(obj).__name__}, which has none. "
                "Pass a trainer or engine that this version of the guard supports."
            )
        self.obj, self.name, self.owner, self._make_wrapper = obj, name, owner, make_wrapper
        self._layer: _Layer | None = None

    @property
    def installed(self) -> bool:
        """Whether calls go through the wrapper now."""
        return self._layer is not None

    def install(self) -> MethodPatch:
        """Put the wrapper in place and return self."""
        taken = vars(self.obj).get(_REGISTRY, frozenset())
        if (self.name, self.owner) in taken:
            raise GuardError(
                f"`{type(self.obj).__name__}.{self.name}` is already patched by {self.owner!r}. Remove the first "
                "guard (trainer.remove_callback) before adding another to the same trainer."
            )
        self._layer = _Layer(self.obj, self.name, self._make_wrapper)
        setattr(self.obj, _REGISTRY, taken | {(self.name, self.owner)})
        return self

    def remove(self) -> None:
        """Take the wrapper out; does nothing when it is not installed."""
        if self._layer is None:
            return
        self._layer.remove()
        self._layer = None
        left = getattr(self.obj, _REGISTRY) - {(self.name, self.owner)}
        if left:
            setattr(self.obj, _REGISTRY, left)
        else:
            delattr(self.obj, _REGISTRY)

    def __enter__(self) -> MethodPatch:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Layer:
    """One wrapper in place, and the instance attribute it covers (None: only the class had the method)."""

    def __init__(self, obj: Any, name: str, make_wrapper: Callable[[Method], Method]) -> None:
        self.obj, self.name, self.active = obj, name, True
        self.below: Method | None = vars(obj).get(name)
        original = getattr(obj, name)
        replacement = make_wrapper(original)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return (replacement if self.active else original)(*args, **kwargs)

        # Not held: in a cycle, what the wrapper refers to would outlive its removal until the collector comes.
        self.wrapper = weakref.ref(wrapper)
        setattr(wrapper, _LAYER, self)
        setattr(obj, name, wrapper)

    def remove(self) -> None:
        self.active = False
        current = vars(self.obj).get(self.name)
        if current is None or current is not self.wrapper():
            return  # something lies on top and calls through, or others took it off
        below = self.below
        while (layer := _layer_of(below)) is not None and not layer.active:
            below = layer.below
        if below is None:
            delattr(self.obj, self.name)
        else:
            setattr(self.obj, self.name, below)


def _layer_of(method: Method | None) -> _Layer | None:
    """The layer that `method` is the wrapper of; functools.wraps copies the mark to others, hence the check."""
    layer = getattr(method, _LAYER, None)
    return layer if isinstance(layer, _Layer) and layer.wrapper() is method else None
