"""One run of the benchmark: a warm start, an arm, and exact pass rates along the way."""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from examples.interference.arms import ARMS, SETTINGS, Arm
from examples.interference.train import train
from examples.interference.warm_start import warm_start

EVALUATE_EVERY = 5


def run(
    setting_name: str, arm: str | Arm, seed: int, cache: Path, steps: int | None = None, **overrides: Any
) -> dict[str, Any]:
    """Train one arm from the warm start of its seed.

    Args:
        arm: a name in ARMS, or an arm of your own.
        steps: instead of the setting's.
        overrides: GRPOConfig fields on top of the setting's.

    Returns:
        A plain record: setting, arm, seed, steps, k, seconds; `trajectory` of exact pass rates every 5 steps, the
        first before training and the last after it; and what the guard did, from its journal.
    """
    torch.set_num_threads(1)  # two runs side by side use two cores better than one run does
    name, arm = (arm, ARMS[arm]) if isinstance(arm, str) else (arm.label, arm)
    setting = replace(SETTINGS[setting_name], steps=steps or SETTINGS[setting_name].steps)
    began = time.monotonic()
    with _quiet(), tempfile.TemporaryDirectory() as folder:

        def prepare(trainer: Any) -> None:
            arm.prepare(trainer, setting)
            trainer.remove_callback(PrinterCallback)

        _, records = train(
            warm_start(cache, seed),
            folder,
            steps=setting.steps,
            k=setting.k,
            seed=seed,
            evaluate_every=EVALUATE_EVERY,
            cosine=False,
            prepare=prepare,
            objective=arm.objective,
            mixture=setting.mixture,
            cue=setting.cue,
            report_to=[],
            disable_tqdm=True,
            **setting.trainer | overrides,
        )
        journal = Path(folder) / "passk_guard.jsonl"
        events = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    return {
        "setting": setting_name,
        "arm": name,
        "seed": seed,
        "steps": setting.steps,
        "k": setting.k,
        "seconds": round(time.monotonic() - began, 1),
        "trajectory": records,
        "guard": _what_the_guard_did(events),
    }


def _what_the_guard_did(events: list[dict[str, Any]]) -> dict[str, Any]:
    refreshes = [e for e in events if e["event"] == "refresh"]
    turned = [e["mitigated"] for e in events if e["event"] == "steps" and "mitigated" in e]
    return {
        "refreshes": len(refreshes),
        "failed_refresh": sum(e["event"] == "failed_refresh" for e in events),
        "cosine": [e.get("cosine") for e in refreshes],
        "floor": [e.get("floor") for e in refreshes],
        "multiplier": [e.get("hold_multiplier") for e in refreshes],
        "above_level": [e.get("hold_above_level") for e in refreshes],
        "reliability": [e.get("protected_reliability") for e in refreshes],
        "steps_measured": len(turned),
        "steps_turned": sum(turned),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing but errors from the stack; two runs side by side would write over each other's lines."""
    loggers = [logging.getLogger(name) for name in ("passk_guard", "accelerate", "httpx")]
    before, verbosity = [logger.level for logger in loggers], transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
