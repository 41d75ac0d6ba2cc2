"""From the noise a run has measured to the probe it takes to see a conflict of a given size, and what that costs."""

from passk_guard.planning.plan import Cost, Option, Plan, make_plan
from passk_guard.planning.summary import outlook

__all__ = ["Cost", "Option", "Plan", "make_plan", "outlook"]
