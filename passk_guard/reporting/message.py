"""The one line a user reads."""

from __future__ import annotations

from passk_guard.estimation.records import ConflictEstimate, Status


def describe_estimate(estimate: ConflictEstimate) -> str:
    """`cos(pass@1, pass@8) = -0.31, 95% CI [-0.44, -0.17], 3 refreshes pooled; k* = 2`, or why there is no number."""
    pair = f"cos(pass@1, pass@{estimate.k})"
    if estimate.cosine is None or estimate.ci_low is None or estimate.ci_high is None:
        return f"{pair} undetermined: {estimate.reason}"
    pooled = "1 refresh" if estimate.num_refreshes == 1 else f"{estimate.num_refreshes} refreshes pooled"
    return (
        f"{pair} = {estimate.cosine:+.2f}, {100 * estimate.confidence:g}% CI "
        f"[{estimate.ci_low:+.2f}, {estimate.ci_high:+.2f}], {pooled}; k* = {estimate.k_star}"
    )


def state_change(
    step: int,
    verdict: Status,
    estimate: ConflictEstimate,
    action: str,
    *,
    held_out: bool = True,
    run_p_value: float | None = None,
) -> str:
    """The log line of a change of verdict, as in `passk_guard step 240: CONFLICT cos(...) = ...; action: observe`.

    A CONFLICT names `run_p_value`, which established it, where the rule is one for the whole run.
    """
    source = "" if held_out else " (training batch, not held out)"
    by_the_run = verdict == "conflict" and run_p_value is not None
    why = f"; {estimate.reason}" if not by_the_run and _needs_a_reason(verdict, estimate) else ""
    if by_the_run:
        why = f"; p = {run_p_value:.2g} over the whole run"
    return f"passk_guard step {step}: {verdict.upper()} {describe_estimate(estimate)}{source}{why}; action: {action}"


def _needs_a_reason(verdict: Status, estimate: ConflictEstimate) -> bool:
    """Where the interval alone does not explain the verdict, which one-sided bounds decide."""
    if estimate.ci_low is None or estimate.ci_high is None:
        return False
    return verdict == "undetermined" or estimate.ci_low <= estimate.threshold <= estimate.ci_high


def void_refresh(step: int, reason: str) -> str:
    """The log line of a refresh that gave no estimate."""
    return f"passk_guard step {step}: refresh void, training goes on: {reason}"


def blind(step: int, voids: int, reason: str) -> str:
    """The alert after several void refreshes in a row."""
    return f"passk_guard step {step}: BLIND, {voids} void refreshes in a row; the last reason: {reason}"
