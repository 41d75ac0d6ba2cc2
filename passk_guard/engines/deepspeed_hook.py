"""The moment before DeepSpeed's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from passk_guard.utils.patching import Method, MethodPatch


class StepHook:
    """Calls a function before each optimizer step of one `DeepSpeedEngine`, by a patch of that instance's `step`.

    DeepSpeed clips, steps and clears the gradient inside `engine.step`, which accelerate calls from within backward:
    by `on_pre_optimizer_step` the gradient is gone. `step` may be called on every micro-batch; only the last one of a
    window counts.

    Attributes:
        inside: True while the function runs.
    """

    def __init__(self, engine: Any) -> None:
        self.inside = False
        self._engine = engine
        self._patch: MethodPatch | None = None

    def install(self, before_step: Callable[[], None]) -> None:
        """Raises GuardError when a hook is installed on this engine."""

        def make(step: Method) -> Method:
            def stepping(*args: Any, **kwargs: Any) -> Any:
                if self._engine.is_gradient_accumulation_boundary():
                    self.inside = True
                    try:
                        before_step()
                    finally:
                        self.inside = False
                return step(*args, **kwargs)

            return stepping

        self._patch = MethodPatch(self._engine, "step", make, owner="passk_guard.engines").install()

    def remove(self) -> None:
        """Does nothing when none is installed."""
        if self._patch is not None:
            self._patch.remove()
            self._patch = None
