"""From the noise a run has measured to the probe that detects a conflict of a given size, and its cost."""

from passk_guard.planning.plan import Cost, Option, Plan, decision_rule, make_plan
from passk_guard.planning.summary import outlook

__all__ = ["Cost", "Option", "Plan", "decision_rule", "make_plan", "outlook"]
