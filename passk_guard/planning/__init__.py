"""From the noise a run has measured to the probe that detects a conflict of a given size, and its cost."""

from passk_guard.planning.inputs import read_noise
from passk_guard.planning.plan import (
    Cost,
    Option,
    Plan,
    decision_rule,
    make_plan,
    prompts_needed,
    refreshes_for_signal,
)
from passk_guard.planning.summary import outlook

__all__ = [
    "Cost",
    "Option",
    "Plan",
    "decision_rule",
    "make_plan",
    "outlook",
    "prompts_needed",
    "read_noise",
    "refreshes_for_signal",
]
