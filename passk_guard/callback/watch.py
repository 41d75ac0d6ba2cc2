"""The one line that attaches a guard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from passk_guard.callback.guard import PassKGuardCallback
from passk_guard.callback.setup import refuse_no_trainer
from passk_guard.config import GuardConfig
from passk_guard.probe.samplers import Sampler


def watch(
    trainer: Any,
    probe: Any = None,
    correct: Any = None,
    config: GuardConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    sampler: Sampler | None = None,
    **settings: Any,
) -> PassKGuardCallback:
    """Guard a trainer: `watch(trainer, probe=held_out, correct=accuracy, k=8)`, before `trainer.train()`.

    Args:
        trainer, probe, correct, config, sampler, settings: as for `PassKGuardCallback`.

    Returns:
        The guard, which is among the trainer's callbacks now.

    Raises:
        GuardError: misuse, as `PassKGuardCallback`.
    """
    refuse_no_trainer(trainer)
    guard = PassKGuardCallback(trainer, probe, correct, config, sampler, **settings)
    trainer.add_callback(guard)
    return guard
