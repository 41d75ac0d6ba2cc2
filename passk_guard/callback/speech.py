"""The lines of the guard: at the start, at the first refresh, where it cannot tell, at the end, and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from passk_guard.callback.budget import FEWEST_PROMPTS, Account
from passk_guard.callback.mitigator import NoMitigation
from passk_guard.callback.state import Memory
from passk_guard.config import GuardConfig
from passk_guard.estimation.records import ConflictEstimate
from passk_guard.probe.prompts import HeldOut
from passk_guard.reporting import describe_estimate

Alarm = Literal["conflict", "losing", "blind"]

_FEW = 4
"""Refreshes of a run below which the guard says that the budget is too small."""


def start(
    config: GuardConfig,
    source: HeldOut | None,
    coverage: float | None,
    action: str,
    remark: str | None,
    run: Sequence[str],
) -> str:
    """What is watched, how often, at which cost, and what is done about it.

    Args:
        config: of the run.
        source: of held-out prompts; None for the training batch.
        coverage: share of the trainable parameters in the sketch; None where no angle is measured.
        action: of the mitigation; remark: how it was chosen.
        run: clauses on the cost and on what the run trains.
    """
    k = config.k
    what = "the training batch (not held out)" if source is None else source.summary
    what += f", resampled every {config.resample_refreshes} refreshes" if config.resample_refreshes > 1 else ""
    if coverage is None:
        watched = f"passk_guard measures the change of pass@1 and pass@{k}"
    elif source is not None and config.instruments != "angle":
        watched = f"passk_guard watches cos(pass@1, pass@{k}) and the change of pass@1 and pass@{k}"
    else:
        watched = f"passk_guard watches cos(pass@1, pass@{k})"
        what += ", from which no realised change can be measured" if source is None else ""
    every = f"every {config.refresh_steps} steps" if config.refresh_steps != 1 else "at every step"
    if config.refresh_steps is None:
        every = f"as often as {100 * config.overhead:g}% of the work of training allows (`overhead`),"
    parts = [f"{watched} {every} on {what}", *run]
    if coverage is not None:
        parts.append(f"the sketch covers {100 * coverage:.1f}% of the trainable parameters")
    return "; ".join([*parts, f"action: {action}" + (f" ({remark})" if remark else "")])


def cadence(step: int, config: GuardConfig, account: Account, source: HeldOut | None, last: int) -> str | None:
    """What a refresh costs and what follows from the budget; None where the work of training is unknown.

    Args:
        step: optimizer steps so far.
        config: of the run.
        account: with a refresh and at least one step.
        source: of held-out prompts; None for the training batch.
        last: optimizer steps of the whole run.
    """
    every = account.cadence(step, config.overhead)
    if every is None:
        return None
    what, smaller = "the training batch", []
    if source is not None:
        size = min(source.size, len(source.probe))
        what = f"{size} x {source.num_samples} completions"
        smaller = ["`probe_prompts`"] * (size > FEWEST_PROMPTS) + ["`num_samples`"] * (source.num_samples > config.k)
    steps = account.refresh * (step - account.since) / account.run
    line = f"passk_guard step {step}: a refresh of {what} is as much work as {steps:.2g} training steps"
    if last // every >= _FEW:
        return f"{line}; there will be one about every {every} steps"
    fit = -(-last // every)
    few = "1 refresh fits" if fit == 1 else f"{fit} refreshes fit"
    return (
        f"{line}; {few} into the {last} steps of this run at overhead={config.overhead:g}; for {_FEW}, set `overhead` "
        f"to {_rounded_up(steps * _FEW / last):g}" + (f" or lower {' or '.join(smaller)}" if smaller else "")
    )


def _rounded_up(value: float) -> float:
    """To one digit."""
    unit = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / unit) * unit


def first_refresh(
    step: int,
    config: GuardConfig,
    memory: Memory,
    estimate: ConflictEstimate | None,
    seconds: float,
    objective: tuple[str, ConflictEstimate] | None = None,
) -> str:
    """Both instruments and the cost, after the first refresh that succeeded; and the run's own objective, by name."""
    if estimate is not None:
        rates = (estimate.pass_at_1, estimate.pass_at_1_se), (estimate.pass_at_k, estimate.pass_at_k_se)
    else:
        one, k = memory.change.fused.pass_at_1, memory.change.fused.pass_at_k
        rates = (one.now, one.now_se), (k.now, k.now_se)
    shown = [
        f"pass@{j} {rate:.3f} ± {se:.3f}"
        for j, (rate, se) in zip((1, config.k), rates, strict=True)
        if rate is not None and se is not None and math.isfinite(se)
    ]
    parts = [", ".join(shown) or "no pass rate with an error"]
    if estimate is not None:
        parts.append(describe_estimate(estimate))
        if objective is not None:
            parts.append(describe_estimate(objective[1], objective[0]))
    if config.instruments != "angle" and config.source == "held_out":
        parts.append("changes are counted from here")
    return f"passk_guard step {step}: first refresh: {'; '.join(parts)}; it took {seconds:.1f} s"


def cannot_tell(
    step: int, config: GuardConfig, reason: str, estimate: ConflictEstimate | None, source: HeldOut | None
) -> str:
    """UNDETERMINED once as many refreshes are in as are pooled: why, and which setting to change next.

    Args:
        step: of the refresh.
        config: of the run.
        reason: of the estimate or the verdict.
        estimate: of the angle, where it is measured.
        source: of held-out prompts; None for the training batch.
    """
    what = "change" if estimate is None else "angle"
    following = _next(config, estimate, source)
    return f"passk_guard step {step}: the {what} is UNDETERMINED: {reason.rstrip('.')}; next: {following}"


def _next(config: GuardConfig, estimate: ConflictEstimate | None, source: HeldOut | None) -> str:
    if estimate is not None and estimate.num_informative < estimate.num_prompts / 2:
        return (
            f"choose prompts that are solved sometimes: {estimate.num_informative} of {estimate.num_prompts} have a "
            "gradient"
        )
    if source is None:
        return f"raise `pool_refreshes`, now {config.pool_refreshes}, or pass held-out prompts as `probe`"
    available, size = len(source.probe), source.size
    if available <= size:
        return f"add prompts to the probe, which has {available}, and raise `probe_prompts`"
    return f"raise `probe_prompts` from {size} to {min(4 * size, available)}"


def found(config: GuardConfig, memory: Memory) -> str:
    """What a run has found in all: the change of pass@1 and pass@k with intervals."""
    sums, fused = memory.change.sums, memory.change.fused
    if not sums.windows:
        return "no realised change was measured"
    run = sums.change(config.confidence)
    levels = zip((1, config.k), (run.pass_at_1, run.pass_at_k), (fused.pass_at_1, fused.pass_at_k), strict=True)
    missed = f", less {run.missed} of {run.missed + run.windows} windows" if run.missed else ""
    return (
        ", ".join(
            f"pass@{j} {curve.total:+.3f} [{curve.ci_low:+.3f}, {curve.ci_high:+.3f}] to {level.now:.3f}"
            for j, curve, level in levels
        )
        + f" by step {memory.step}{missed}"
    )


def what_to_do(alarm: Alarm, config: GuardConfig, mitigator: NoMitigation, has_objective: bool) -> str:
    """The next thing to do about an alarm, with the setting's name.

    Args:
        alarm: CONFLICT, LOSING, or no valid refresh ("blind").
        config: of the run.
        mitigator: of the run, which may act already.
        has_objective: whether a PassKObjective is installed.
    """
    if alarm == "blind":
        return (
            "mend what the reason names; until a refresh succeeds nothing is measured and no step is projected "
            f"(`failed_refresh_alert`={config.failed_refresh_alert} refreshes in a row)"
        )
    acting = []
    if mitigator.steps is not None and mitigator.hold is None:
        acting.append(f"raise `gamma` above {config.gamma:g}")
    if mitigator.floor is not None:
        acting.append(f"raise `floor_gamma` above {config.floor_gamma:g} or `floor_max` above {config.floor_max:g}")
    if mitigator.hold is not None:
        acting.append("raise `overhead`, or lower `refresh_steps`, so that hold sees more")
    if acting:
        return f"{'if pass@1 falls, ' if alarm == 'conflict' else ''}{' and '.join(acting)}"
    if has_objective:
        advice = 'set `mitigation="hold"`, or `mitigation="project"`'
    elif alarm == "conflict":
        return (
            f'if this run trains on pass@{config.k}, or before it does, set `mitigation="project"`, or '
            '`mitigation="reweight"` with a PassKObjective'
        )
    else:
        advice = 'set `mitigation="project"`'
    if alarm == "losing" and config.on_loss != "stop":
        at = "" if config.max_loss is not None else "`max_loss=0.05` with "
        advice += f'; to end a run that loses too much, {at}`on_loss="stop"`'
    return advice
