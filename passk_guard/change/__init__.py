"""The realised change: what the updates did to pass@1 and pass@k. Needs torch alone."""

from passk_guard.change.cumulate import ChangeSums, CurveChange, RunChange, cumulate
from passk_guard.change.estimate import (
    ChangeEstimate,
    GroupChange,
    LevelEstimate,
    MeanChange,
    estimate_change,
    estimate_level,
    estimate_mean_change,
)
from passk_guard.change.fuse import PASS_AT_1, Fused, FusedCurve, HeldCurve
from passk_guard.change.solve_rate import RateChange, change_by_solve_rate
from passk_guard.change.verdict import Outcome, OutcomeRule, OutcomeState, OutcomeVerdict, judge, missed_in_words

__all__ = [
    "PASS_AT_1",
    "ChangeEstimate",
    "ChangeSums",
    "CurveChange",
    "Fused",
    "FusedCurve",
    "GroupChange",
    "HeldCurve",
    "LevelEstimate",
    "MeanChange",
    "Outcome",
    "OutcomeRule",
    "OutcomeState",
    "OutcomeVerdict",
    "RateChange",
    "RunChange",
    "change_by_solve_rate",
    "cumulate",
    "estimate_change",
    "estimate_level",
    "estimate_mean_change",
    "judge",
    "missed_in_words",
]
