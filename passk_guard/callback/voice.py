"""Says what is routine in a run, each thing once, and what to do about an alarm; what fails in it is only logged."""

from __future__ import annotations

from typing import Any

from passk_guard.callback import speech
from passk_guard.callback.budget import Account, sized_by_budget
from passk_guard.callback.facts import cost_of_a_refresh, different_k, trains_on
from passk_guard.callback.mitigator import NoMitigation
from passk_guard.callback.realised import WindowResult
from passk_guard.callback.setup import recurrence
from passk_guard.callback.state import Memory
from passk_guard.config import GuardConfig
from passk_guard.estimation.records import ConflictEstimate
from passk_guard.mitigation.objective import PassKObjective
from passk_guard.probe.prompts import HeldOut
from passk_guard.probe.samplers import TRLSampler
from passk_guard.probe.samplers.trajectories import what_acts
from passk_guard.probe.verifier import Verifier
from passk_guard.reporting import Reporter
from passk_guard.reporting.reporter import quietly


class Voice:
    """The lines of one guard.

    Args:
        trainer: of the guard.
        verifier: whose partial rewards are told of.
        config: of the guard.
        reporter: takes the lines.
    """

    def __init__(self, trainer: Any, verifier: Verifier, config: GuardConfig, reporter: Reporter) -> None:
        self._trainer, self._verifier, self._config, self._reporter = trainer, verifier, config, reporter
        self._source: HeldOut | None = None
        self._first = self._partial = self._paced = False

    @quietly
    def begin(
        self, memory: Memory, mitigator: NoMitigation, source: HeldOut | None, coverage: float | None, passes: str
    ) -> None:
        """The line at the start.

        Args:
            memory, mitigator: of the run.
            source: of held-out prompts; None for the training batch.
            coverage: of the sketch; None where no angle is measured.
            passes: what a pass of the probe takes.
        """
        trainer, config = self._trainer, self._config
        self._source = source
        self._first, self._partial, self._paced = memory.step < 0, True, memory.account.refreshes > 1
        run = [cost_of_a_refresh(trainer, source, config), passes, trains_on(trainer, config, self._verifier)]
        acts = what_acts(trainer) if source is not None and isinstance(source.sampler, TRLSampler) else None
        run += [acts] if acts is not None else []
        action, remark = mitigator.action(memory), mitigator.remark
        self._reporter.say(speech.start(config, source, coverage, action, remark, run))
        # Where the budget sizes a refresh, its size is known only now.
        sized = source if sized_by_budget(config) else None
        if sized is not None and (reason := recurrence(len(sized.probe), sized.size, config)) is not None:
            self._reporter.warn(reason)
        if (reason := different_k(trainer, config)) is not None:
            self._reporter.warn(f"passk_guard: {reason}")

    @quietly
    def cadence(self, step: int, account: Account) -> None:
        """What a refresh costs and how often there will be one, once training has shown what a step does."""
        last = self._trainer.state.max_steps
        if self._paced:
            return
        self._paced = True
        if (message := speech.cadence(step, self._config, account, self._source, last)) is not None:
            self._reporter.say(message)

    @quietly
    def refreshed(
        self,
        step: int,
        memory: Memory,
        estimate: ConflictEstimate | None,
        seconds: float,
        objective: tuple[str, ConflictEstimate] | None = None,
    ) -> None:
        """The line at the first refresh of a run, and one where rewards between wrong and right are met first."""
        if self._first:
            self._first = False
            self._reporter.say(speech.first_refresh(step, self._config, memory, estimate, seconds, objective))
        verifier = self._verifier
        if self._partial and verifier.partial is not None:
            self._partial = False
            self._reporter.warn(
                f"passk_guard: `{verifier.name}` gives rewards such as {verifier.partial:g}, below correct_threshold="
                f"{verifier.threshold:g}, which count as wrong; set `correct_threshold` if they mean correct"
            )

    @quietly
    def pool_is_full(self, step: int, estimate: ConflictEstimate) -> None:
        """Why the angle is undetermined, once as many refreshes are in as are pooled."""
        self._cannot_tell(step, estimate.reason, estimate)

    @quietly
    def window(self, window: WindowResult) -> None:
        """The same of the change, where it alone is measured."""
        full = window.run.windows == self._config.pool_refreshes
        if self._config.instruments == "change" and full and window.verdict.outcome == "undetermined":
            self._cannot_tell(window.ended, window.verdict.reason)

    @quietly
    def end(self, step: int, memory: Memory) -> None:
        """The summary at the end."""
        share = memory.account.share
        work = "" if share is None else f"; work of the probe {share:.2g} of that of training"
        self._reporter.end(step, speech.found(self._config, memory) + work)

    def what_to_do(self, alarm: speech.Alarm, mitigator: NoMitigation) -> str:
        """As `speech.what_to_do`."""
        return speech.what_to_do(alarm, self._config, mitigator, PassKObjective.of(self._trainer) is not None)

    def _cannot_tell(self, step: int, reason: str, estimate: ConflictEstimate | None = None) -> None:
        self._reporter.say(speech.cannot_tell(step, self._config, reason, estimate, self._source))
