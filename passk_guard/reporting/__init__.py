"""Where a user meets the numbers: log rows, log lines, the journal, trackers."""

from passk_guard.reporting.journal import Journal
from passk_guard.reporting.log_rows import describe_estimate, estimate_metrics
from passk_guard.reporting.reporter import JOURNAL_NAME, Reporter

__all__ = ["JOURNAL_NAME", "Journal", "Reporter", "describe_estimate", "estimate_metrics"]
