"""From the noise a run has measured to the probe it takes to see a conflict of a given size, and what that costs."""

from passk_guard.planning.outlook import outlook, refresh_noise
from passk_guard.planning.plan import Cost, Option, Plan, make_plan

__all__ = ["Cost", "Option", "Plan", "make_plan", "outlook", "refresh_noise"]
