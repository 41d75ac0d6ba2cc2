"""From an estimate to named numbers for a log row."""

from __future__ import annotations

from collections.abc import Mapping

from passk_guard.estimation.records import ConflictEstimate, Status

Metrics = Mapping[str, float | None]
PREFIX = "passk_guard/"


def estimate_metrics(estimate: ConflictEstimate, verdict: Status) -> dict[str, float | None]:
    """The numbers of a refresh, None where undetermined. Names hold no `@`, which trackers rewrite.

    Returns:
        cosine with `cosine_ci_low` and `cosine_ci_high`, pass rates each with its standard error, `k_star`,
        `agreement` (E[w a] / E[w], the mean agreement score under the pass@k weights), `frac_negative_pairs`, and
        `conflict`: 1 and 0 for the standing verdicts conflict and clear.
    """
    k = estimate.k
    inner, weight = estimate.mean_weighted_agreement, estimate.mean_weight
    return {
        "cosine": estimate.cosine,
        "cosine_ci_low": estimate.ci_low,
        "cosine_ci_high": estimate.ci_high,
        "pass_at_1": estimate.pass_at_1,
        "pass_at_1_se": estimate.pass_at_1_se,
        f"pass_at_{k}": estimate.pass_at_k,
        f"pass_at_{k}_se": estimate.pass_at_k_se,
        "k_star": None if estimate.k_star is None else float(estimate.k_star),
        "agreement": inner / weight if inner is not None and weight else None,
        "frac_negative_pairs": estimate.frac_negative_pairs,
        "conflict": {"conflict": 1.0, "clear": 0.0}.get(verdict),
    }


def log_row(metrics: Metrics) -> dict[str, float]:
    """What a tracker can take: prefixed names, undetermined numbers left out."""
    return {PREFIX + name: value for name, value in metrics.items() if value is not None}
