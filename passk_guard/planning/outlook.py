"""What a run writes down of its noise at each refresh, and what it says of its power once it knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from passk_guard.config import GuardConfig
from passk_guard.estimation.noise import average_noise, measure_noise
from passk_guard.estimation.records import ProbeGram
from passk_guard.planning.plan import Cost, make_plan
from passk_guard.planning.words import plan_line


def refresh_noise(probe: ProbeGram, k: int) -> dict[str, Any] | None:
    """The noise of one refresh as plain numbers, for the journal; None where it has none."""
    noise = measure_noise(probe, k)
    return None if noise is None else noise.to_dict()


def outlook(history: Sequence[ProbeGram], config: GuardConfig, probe_seconds: float | None) -> str:
    """The one line on the power of a run, from its first refreshes.

    Args:
        history: the refreshes so far.
        config: of the run.
        probe_seconds: of the newest refresh.
    """
    parts = [noise for probe in history if (noise := measure_noise(probe, config.k)) is not None]
    if not parts:
        return "no power can be stated: no prompt has a gradient; choose prompts the model solves sometimes"
    noise = average_noise(parts)
    double = 2 * round(noise.prompts)
    return plan_line(make_plan(noise, config, prompts=(double,), cost=Cost(probe_seconds)))
