"""The conflicts that a probe of each size would detect, and its cost: the record behind the table and the JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from passk_guard.config import GuardConfig
from passk_guard.estimation.power import (
    MOST_PROMPTS,
    Noise,
    Signal,
    fewest_prompts,
    look_of,
    looks_until_called,
    signal_of,
)
from passk_guard.estimation.verdict import DecisionRule
from passk_guard.utils.errors import GuardError

PROMPTS = (32, 64, 128, 256, 512)
USUAL_GAP = 0.2
"""The cosine planned for by default is this far below the threshold."""

_MOST_POWER = 0.99  # as far as the simulated runs reach


@dataclass(frozen=True)
class Cost:
    """Measured costs of the run.

    Attributes:
        probe_seconds: of a refresh at the size of probe it had; None where unknown.
        step_seconds: of a training step without its probe; None where unknown.
        refresh_steps: optimizer steps between two refreshes at that size, where the budget decides; None where unknown.
    """

    probe_seconds: float | None = None
    step_seconds: float | None = None
    refresh_steps: float | None = None


@dataclass(frozen=True)
class Option:
    """One size of probe.

    Attributes:
        prompts: m, of each refresh.
        refreshes: within which the conflict is called with the power asked for; None where it takes more than
            `power.MOST_LOOKS`, or where no number can be stated.
        fewest, most: the same where signal over noise is one standard error larger, or smaller, than measured. Where
            the signal is not established, `fewest` is at what it can be at most, and nothing else is stated.
        steps: until then; with `resample_refreshes` only every so many refreshes count, those that sample. Under a
            budget, more prompts mean fewer refreshes. None where the cadence is unknown.
        seconds: of probing for each training step, in proportion to the prompts; None where unknown.
        share: of the time of a training step without a probe; None where unknown.
        as_measured: where the signal is not established, `refreshes` if it is what was measured all the same; None
            where it takes more than `power.MOST_LOOKS`, or where a norm was not even measured to be positive.
    """

    prompts: int
    refreshes: int | None
    fewest: int | None
    most: int | None
    steps: int | None
    seconds: float | None
    share: float | None
    as_measured: int | None = None


@dataclass(frozen=True)
class Plan:
    """The power of a guard's rules at the measured noise.

    Attributes:
        config: the run's settings.
        cosine, power: asked for.
        noise: as measured.
        signal: in it. `signal.size` is None where the probe holds no signal.
        options: by rising prompts, the run's own size among them.
        single: refreshes pooled -> prompts of each with which that one estimate has the power, None above
            `power.MOST_PROMPTS`; empty without a signal.
        cost: of the run.
    """

    config: GuardConfig
    cosine: float
    power: float
    noise: Noise
    signal: Signal
    options: list[Option]
    single: dict[int, int | None] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    @property
    def prompts(self) -> int:
        """Prompts of a refresh in the run."""
        return round(self.noise.prompts)

    @property
    def own(self) -> Option:
        """The option of the run's own size."""
        return next(option for option in self.options if option.prompts == self.prompts)

    @property
    def own_cosine(self) -> float:
        """The cosine of the refreshes that were measured, in [-1, 1]; 0 without a signal."""
        inner, size = float(self.noise.value[0]), self.signal.size
        return 0.0 if size is None else max(-1.0, min(1.0, inner / size))

    @property
    def refreshes_for_signal(self) -> int | None:
        """How many refreshes like these would establish both norms if they are as measured; None where one is not
        even positive, or where both are established."""
        return None if self.signal.size is not None else refreshes_for_signal(self.noise)

    def to_dict(self) -> dict[str, Any]:
        """Nested mappings and lists of what JSON knows; a signal that is not established has the error null."""
        config = self.config
        return {
            "k": config.k,
            "num_samples": config.num_samples,
            "alert_rule": config.advanced.alert_rule,
            "confidence": config.confidence,
            "threshold": config.threshold,
            "refresh_steps": config.refresh_steps or self.cost.refresh_steps,
            "cosine": self.cosine,
            "power": self.power,
            "own_cosine": None if self.signal.size is None else self.own_cosine,
            "noise": self.noise.to_dict() | {"refreshes": self.noise.refreshes},
            "signal": asdict(self.signal) | ({"error": None} if self.signal.size is None else {}),
            "refreshes_for_signal": self.refreshes_for_signal,
            "cost": asdict(self.cost),
            "options": [asdict(option) for option in self.options],
            "single": [{"refreshes": pool, "prompts": m} for pool, m in self.single.items()],
        }


def make_plan(
    noise: Noise,
    config: GuardConfig,
    *,
    cosine: float | None = None,
    power: float = 0.9,
    prompts: Sequence[int] = PROMPTS,
    cost: Cost | None = None,
) -> Plan:
    """Plan for a conflict that is there from the start of a run, with the run's own n, k and rule.

    Args:
        noise: as measured.
        config: of the run.
        cosine: to be called a conflict; by default 0.2 below the threshold.
        power: chance that it is.
        prompts: sizes of probe to plan for, beside the run's.
        cost: measured costs of the run.

    Raises:
        GuardError: a cosine that is no conflict, a power or a number of prompts outside its range.
    """
    cosine = max(-1.0, config.threshold - USUAL_GAP) if cosine is None else cosine
    if not -1 <= cosine < config.threshold:
        raise GuardError(
            f"Expected -1 <= `cosine` < threshold; found cosine={cosine}, threshold={config.threshold:g}. Only a "
            "cosine below the threshold is a conflict."
        )
    if not 0 < power <= _MOST_POWER:
        raise GuardError(f"Expected 0 < `power` <= {_MOST_POWER}; found {power}.")
    if any(m < 4 for m in prompts):
        raise GuardError(f"Expected `prompts` >= 4; found {min(prompts)}.")
    cost, own = cost or Cost(), round(noise.prompts)
    # Refreshes with fresh samples in the pool of a refresh that samples.
    pooled = 1 + math.ceil((config.pool_refreshes - 1) / config.resample_refreshes)
    signal = signal_of(noise, config.confidence)

    def option(m: int) -> Option:
        seconds: float | None = None
        every: float | None = config.refresh_steps
        if every is None and cost.refresh_steps is not None:
            every = cost.refresh_steps * m / noise.prompts
        if cost.probe_seconds is not None and every is not None:
            seconds = cost.probe_seconds * m / noise.prompts / every
        share = seconds / cost.step_seconds if seconds is not None and cost.step_seconds else None

        def within(size: float) -> int | None:
            look = look_of(noise, size, cosine, m, config.threshold)
            return looks_until_called(look, decision_rule(config), power, confidence=config.confidence, pool=pooled)

        if signal.size is None:
            least, seen = (within(size) if size > 0 else None for size in (signal.most, measured_size(noise)))
            return Option(m, None, least, None, None, seconds, share, seen)
        found = within(signal.size)
        low, high = (within(signal.size * math.exp(sign * signal.error)) for sign in (1, -1))
        steps = None
        if found is not None and every is not None:
            steps = math.ceil(found * every * config.resample_refreshes)
        return Option(m, found, low, high, steps, seconds, share)

    limits = {"threshold": config.threshold, "confidence": config.confidence}
    single: dict[int, int | None] = {}
    if (size := signal.size) is not None:
        single = {n: fewest_prompts(noise, size, cosine, power, refreshes=n, **limits) for n in sorted({1, pooled})}
    options = [option(m) for m in sorted({*prompts, own})]
    return Plan(config, cosine, power, noise, signal, options, single, cost)


def measured_size(noise: Noise) -> float:
    """|grad J_1||grad J_k| as measured, established or not; 0 where one of the squared norms is not positive."""
    return math.sqrt(math.prod(max(0.0, norm) for norm in noise.value[1:].tolist()))


def refreshes_for_signal(noise: Noise) -> int | None:
    """How many refreshes like these would establish both norms if they are as measured; None where one is not > 0."""
    norms = noise.value[1:].tolist()
    if min(norms) <= 0:
        return None
    worst = max(noise.error(i) / norm for i, norm in enumerate(norms, 1))
    return math.ceil(noise.refreshes * (1.645 * worst) ** 2)


def prompts_needed(
    noise: Noise, threshold: float, confidence: float, power: float = 0.9
) -> tuple[float, int | str] | None:
    """The cosine planned for by default, and the prompts with which one estimate finds it; None without a signal."""
    cosine, size = max(-1.0, threshold - USUAL_GAP), signal_of(noise, confidence).size
    if size is None:
        return None
    found = fewest_prompts(noise, size, cosine, power, threshold=threshold, confidence=confidence)
    return cosine, f"more than {MOST_PROMPTS}" if found is None else found


def decision_rule(config: GuardConfig) -> DecisionRule:
    """The rule by which a run with these settings calls CONFLICT."""
    over_the_run = config.advanced.alert_rule == "whole_run"
    return DecisionRule(config.patience, config.cooldown, 1 - config.confidence if over_the_run else None)
