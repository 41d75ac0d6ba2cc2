"""A plan as text: the line in the log of a run and the page in a terminal. And the noise that a run journals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from passk_guard.config import GuardConfig
from passk_guard.estimation.power import MOST_LOOKS, MOST_PROMPTS, average_noise, measure_noise
from passk_guard.estimation.records import ProbeGram
from passk_guard.planning.plan import Cost, Option, Plan, make_plan, measured_size


def plan_line(plan: Plan) -> str:
    """One line for the log of a run: the power on its size of probe, and on twice the prompts."""
    own = plan.own
    if plan.signal.size is None:
        return f"no power can be stated: {no_signal(plan)}{_as_measured(plan)}"
    more = plan.options[-1]
    line = (
        f"at the noise measured so far, a cosine of {plan.cosine:+.2f} would be called CONFLICT {_within(own)} with "
        f"{100 * plan.power:g}% power on {own.prompts} prompts x {plan.config.num_samples}"
    )
    if own.steps is not None:
        line = line.replace(" with ", f", {own.steps} steps, with ", 1)
    cost = f", +{more.seconds - own.seconds:.2g} s per step" if more.seconds is not None and own.seconds else ""
    return f"{line}; on {more.prompts} prompts {_within(more)}{cost}"


def no_signal(plan: Plan) -> str:
    """The norm that is not established, and what would help."""
    noise, k = plan.noise, plan.config.k
    norms = {"|grad J_1|^2": 1, f"|grad J_{k}|^2": 2}
    worst = min(norms, key=lambda name: float(noise.value[norms[name]]) / (noise.error(norms[name]) or 1.0))
    refreshes = plan.refreshes_for_signal
    help_ = "choose prompts the model solves sometimes"
    if noise.solved + noise.failed < 0.5:
        help_ = "raise probe_prompts or num_samples"
    if refreshes is not None:
        help_ += f", or wait: as large as it seems, {_many(refreshes, 'refresh')} like these establish it"
    return (
        f"{worst} = {float(noise.value[norms[worst]]):.2g} ± {noise.error(norms[worst]):.2g} is not established over "
        f"{_many(noise.refreshes, 'refresh')}; {prompts_with_a_gradient(plan)}; {help_}"
    )


def _as_measured(plan: Plan) -> str:
    """What a plan from the signal as measured would say, beside the least that it can be; empty without either."""
    own = plan.own
    if measured_size(plan.noise) == 0 or own.fewest is None:
        return ""
    return (
        f"; if the signal is what was measured, a cosine of {plan.cosine:+.2f} would be called CONFLICT in "
        f"{_count(own.as_measured)} refreshes, at the very least in {own.fewest}"
    )


def prompts_with_a_gradient(plan: Plan) -> str:
    """`71% of the prompts have a gradient (20% always solved, 9% never)`."""
    solved, failed = plan.noise.solved, plan.noise.failed
    return f"{1 - solved - failed:.0%} of the prompts have a gradient ({solved:.0%} always solved, {failed:.0%} never)"


def describe_plan(plan: Plan, where: str) -> Iterator[str]:
    """The lines of the page.

    Args:
        where: what the noise was measured in, e.g. the folder and the steps.
    """
    config = plan.config
    every = config.refresh_steps or plan.cost.refresh_steps
    yield (
        f"{where}: cos(pass@1, pass@{config.k}) on {plan.prompts} prompts x {config.num_samples} samples"
        + (f" every {every:g} steps" if every is not None else "")
        + (f" (overhead {config.overhead:g})" if config.refresh_steps is None else "")
    )
    yield prompts_with_a_gradient(plan)
    yield ""
    rule = f"at most {1 - config.confidence:.0%} false alerts in a run"
    if config.advanced.alert_rule == "each_look":
        rule = f"{config.patience} checks in a row, each at {config.confidence:.0%}"
    if plan.signal.size is None:
        yield f"No power can be stated: {no_signal(plan)}."
        yield ""
        yield (
            f"Refreshes for a cosine of {plan.cosine:+.2f} with {plan.power:.0%} power ({rule}), if the signal is what "
            "was measured, and at the very least:"
        )
    else:
        yield (
            f"A cosine of {plan.cosine:+.2f} from the start of a run on is called CONFLICT with {plan.power:.0%} power "
            f"({rule}):"
        )
    yield ""
    yield from _table(plan)
    yield ""
    if plan.single:
        yield "One estimate alone has that power with " + " and with ".join(
            f"{_prompts(m)}" + ("" if pool == 1 else f" in each of {pool} pooled refreshes")
            for pool, m in plan.single.items()
        )
        yield "Range: signal over noise one standard error larger or smaller than measured."
    if plan.signal.size is not None and plan.own_cosine < 2 * plan.cosine - config.threshold:
        yield (
            f"The noise was measured at a cosine of {plan.own_cosine:+.2f}: a stronger conflict is noisier, so that "
            f"one of {plan.cosine:+.2f} may well be called sooner."
        )
    if config.resample_refreshes > 1:
        yield f"Only refreshes that sample count, one in {config.resample_refreshes}; the others add no evidence."
    yield "Assumed: the noise stays as it is, prompts are new in each refresh, cost is in proportion to the prompts."
    yield "More samples of each prompt are not planned for: at equal cost more prompts detect more."


def _table(plan: Plan) -> Iterator[str]:
    head = ("prompts", "refreshes", "range", "steps", "probe, s per step", "of a step")
    yield "  {:>8}  {:>10}  {:>14}  {:>7}  {:>18}  {:>9}".format(*head)
    for option in plan.options:
        mark = ">" if option.prompts == plan.prompts else " "
        seconds = "-" if option.seconds is None else f"{option.seconds:.2g}"
        share = "-" if option.share is None else f"{option.share:.0%}"
        steps = "-" if option.steps is None else str(option.steps)
        found, span = _count(option.refreshes), _range(option)
        if plan.signal.size is None:
            found = "-" if measured_size(plan.noise) == 0 else _count(option.as_measured)
            span = "" if option.fewest is None else f"{option.fewest} or more"
        yield f"{mark} {option.prompts:>8}  {found:>10}  {span:>14}  {steps:>7}  {seconds:>18}  {share:>9}"


def _within(option: Option) -> str:
    if option.refreshes is None:
        return f"not within {MOST_LOOKS} refreshes"
    return f"within {option.refreshes} refreshes ({_range(option)})"


def _range(option: Option) -> str:
    return f"{_count(option.fewest)} to {_count(option.most)}" if option.fewest is not None else _count(None)


def _count(count: int | None) -> str:
    return f"> {MOST_LOOKS}" if count is None else str(count)


def _prompts(count: int | None) -> str:
    return f"more than {MOST_PROMPTS} prompts" if count is None else f"{count} prompts"


def _many(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}es"


def outlook(history: Sequence[ProbeGram], config: GuardConfig, cost: Cost) -> str:
    """The one line on the power of a run, from its first refreshes.

    Args:
        history: the refreshes so far.
        config: of the run.
        cost: of the newest refresh.
    """
    parts = [noise for probe in history if (noise := measure_noise(probe, config.k)) is not None]
    if not parts:
        return "no power can be stated: no prompt has a gradient; choose prompts the model solves sometimes"
    noise = average_noise(parts)
    double = 2 * round(noise.prompts)
    return plan_line(make_plan(noise, config, prompts=(double,), cost=cost))
