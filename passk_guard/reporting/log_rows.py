"""The guard's numbers on the same log row as the loss, and the lines that a user reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from passk_guard.estimation.records import ConflictEstimate, Status
from passk_guard.utils.patching import MethodPatch
from passk_guard.utils.text import describe_error

logger = logging.getLogger(__name__)

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


def describe_estimate(estimate: ConflictEstimate, objective: str | None = None) -> str:
    """`cos(pass@1, pass@8) = -0.31, 95% CI [-0.44, -0.17], 3 refreshes pooled; k* = 2`, or why there is no number.

    `objective` is the name of another one that the estimate is of; it has no k*.
    """
    pair = f"cos(pass@1, {objective or f'pass@{estimate.k}'})"
    if estimate.cosine is None or estimate.ci_low is None or estimate.ci_high is None:
        return f"{pair} undetermined: {estimate.reason}"
    pooled = "1 refresh" if estimate.num_refreshes == 1 else f"{estimate.num_refreshes} refreshes pooled"
    number = (
        f"{pair} = {estimate.cosine:+.2f}, {100 * estimate.confidence:g}% CI "
        f"[{estimate.ci_low:+.2f}, {estimate.ci_high:+.2f}], {pooled}"
    )
    return number if objective is not None else f"{number}; k* = {estimate.k_star}"


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
    low, high, why = estimate.ci_low, estimate.ci_high, ""
    if verdict == "conflict" and run_p_value is not None:
        why = f"; p = {run_p_value:.2g} over the whole run"
    elif low is not None and high is not None and (verdict == "undetermined" or low <= estimate.threshold <= high):
        why = f"; {estimate.reason}"  # a verdict that patience keeps, which the newest interval does not explain
    found = describe_estimate(estimate)
    if verdict == "undetermined":  # which need not be said twice
        found = found.replace(" undetermined: ", ": ", 1)
    return f"passk_guard step {step}: {verdict.upper()} {found}{source}{why}; action: {action}"


class LogRows:
    """Adds the newest metrics to the next row the trainer logs with a loss.

    The row is completed inside `trainer.log`: what a callback changes in on_log reaches neither log_history nor
    the trackers. Each refresh is reported once.

    Args:
        trainer: a transformers Trainer or one of its children.
        since_last: called at each row for the numbers of the steps since the one before.

    Raises:
        GuardError: from `install`, when another guard is installed on this trainer.
    """

    def __init__(self, trainer: Any, since_last: Callable[[], Metrics] = dict) -> None:
        self._since_last = since_last
        self._waiting: dict[str, float] = {}
        self._warned = False
        self._patch = MethodPatch(trainer, "log", self._complete, owner="passk_guard.LogRows")

    def put(self, metrics: Metrics) -> None:
        """Numbers for the next row; newer ones replace older ones of the same refresh cycle."""
        self._waiting = log_row(metrics)

    def add(self, metrics: Metrics) -> None:
        """More numbers of the same refresh."""
        self._waiting |= log_row(metrics)

    def install(self) -> None:
        """Start completing rows."""
        self._patch.install()

    def remove(self) -> None:
        """Give the trainer its own `log` back."""
        self._patch.remove()

    def _complete(self, original: Callable[..., None]) -> Callable[..., None]:
        def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                logs = {**logs, **self._waiting, **self._newest()}
                self._waiting = {}
            return original(logs, *args, **kwargs)

        return log

    def _newest(self) -> dict[str, float]:
        try:
            return log_row(self._since_last())
        except Exception as error:
            if not self._warned:
                self._warned = True
                logger.warning("passk_guard: numbers of the last steps are missing: %s", describe_error(error))
            return {}
