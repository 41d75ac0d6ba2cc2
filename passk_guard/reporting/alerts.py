"""Alerts in the trackers a run reports to."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection

from passk_guard.utils.text import describe_error

logger = logging.getLogger(__name__)


def send_alert(title: str, text: str, trackers: Collection[str]) -> list[str]:
    """Raise an alert in wandb and trackio where the run reports to them; a tracker that fails is only logged.

    Trackers are looked up among the imported modules: one that the run uses is imported, and an alert must
    never start another.

    Args:
        title: short, for a phone; text: the log line.
        trackers: names in `TrainingArguments.report_to`.

    Returns:
        Names of the trackers that took it.
    """
    reached = []
    for name in ("wandb", "trackio"):
        tracker = sys.modules.get(name)
        if name not in trackers or tracker is None:
            continue
        try:
            if name == "wandb" and getattr(tracker, "run", None) is None:
                continue
            tracker.alert(title=title, text=text, level=tracker.AlertLevel.WARN)
            reached.append(name)
        except Exception as error:
            logger.warning("passk_guard: %s did not take the alert: %s", name, describe_error(error))
    return reached
