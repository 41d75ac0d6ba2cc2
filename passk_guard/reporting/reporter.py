"""Every way out of the guard in one place: log rows, warning lines, journal, tracker alerts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from passk_guard.estimation.records import ConflictEstimate, ProbeGram, Status
from passk_guard.journal_file import JOURNAL_NAME
from passk_guard.reporting.alerts import send_alert
from passk_guard.reporting.images import Images
from passk_guard.reporting.journal import Journal
from passk_guard.reporting.log_rows import LogRows
from passk_guard.reporting.message import blind, state_change, void_refresh
from passk_guard.reporting.metrics import Metrics, estimate_metrics
from passk_guard.reporting.pace import Pace
from passk_guard.reporting.quiet import quietly
from passk_guard.utils.text import one_line

logger = logging.getLogger("passk_guard")


class Reporter:
    """Tells the user; only the first rank speaks. Nothing that fails in here reaches training.

    Args:
        trainer: whose log rows are completed, and whose `report_to` names the trackers.
        held_out: False where the numbers describe the training batch, which every line then says.
        since_last: asked at each log row for the numbers of the steps since the row before.
        image_refreshes: refreshes between pictures of the kernel in the trackers; 0 sends none.
        settings: written into the journal when a run starts; None writes nothing then.
        noise: of a refresh, as numbers that a plan is made from, for the journal; asked on the first rank alone.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        held_out: bool,
        since_last: Callable[[], Metrics] = dict,
        image_refreshes: int = 0,
        settings: Mapping[str, Any] | None = None,
        noise: Callable[[ProbeGram], Mapping[str, Any] | None] = lambda probe: None,
    ) -> None:
        self._trainer = trainer
        self._held_out = held_out
        self._rows = LogRows(trainer, self._steps)
        self._since_last = since_last
        self._journal = Journal(None)
        self._images = Images(trainer, image_refreshes)
        self._settings = settings
        self._noise = noise
        self._pace = Pace()

    def open(self) -> None:
        """Start a run: complete log rows from here on, and append to `passk_guard.jsonl` in its output folder.

        Raises:
            GuardError: another guard reports on this trainer.
        """
        self._rows.install()
        self._pace.forget()
        self._open_journal()

    @quietly
    def _open_journal(self) -> None:
        folder = Path(self._trainer.args.output_dir)
        self._journal = Journal(folder / JOURNAL_NAME if self._speaks else None)
        if self._settings is not None:
            self._journal.write("start", self._trainer.state.global_step, settings=dict(self._settings))

    @quietly
    def close(self) -> None:
        """Give the trainer its own `log` back."""
        self._rows.remove()

    @quietly
    def refresh(
        self,
        step: int,
        estimate: ConflictEstimate,
        verdict: Status,
        extra: Metrics,
        *,
        remark: str | None,
        probe: ProbeGram | None = None,
    ) -> None:
        """Numbers of one refresh, with those of the mitigation in `extra`, for the next log row and the journal.

        With `probe`, the refresh's own, the prompts in the pictures of the kernel run from easy to hard.
        """
        metrics = estimate_metrics(estimate, verdict) | dict(extra)
        self._rows.put(metrics)
        step_seconds = self._pace.arrive(step, metrics.get("probe_seconds"))
        self._journal.write(
            "refresh",
            step,
            status=estimate.status,
            verdict=verdict,
            reason=estimate.reason,
            k=estimate.k,
            threshold=estimate.threshold,
            confidence=estimate.confidence,
            refreshes=estimate.num_refreshes,
            prompts=estimate.num_prompts,
            informative=estimate.num_informative,
            held_out=self._held_out,
            remark=remark,
            inner_product=estimate.inner_product,
            inner_product_se=estimate.inner_product_se,
            norm1_sq=estimate.norm1_sq,
            normk_sq=estimate.normk_sq,
            weight_agreement_cov=estimate.weight_agreement_cov,
            step_seconds=step_seconds,
            noise=self._noise_of(probe),
            **metrics,
        )
        if remark:
            self.warn(f"passk_guard step {step}: {remark}")
        if self._speaks:
            self._images.refresh(step, estimate, probe)
        self._pace.leave(step)

    @quietly
    def change(
        self,
        step: int,
        estimate: ConflictEstimate,
        *,
        before: Status,
        after: Status,
        action: str,
        run_p_value: float | None = None,
    ) -> None:
        """A change of verdict: one warning line, one line in the journal, one alert."""
        message = state_change(step, after, estimate, action, held_out=self._held_out, run_p_value=run_p_value)
        self._journal.write("state", step, **{"from": before, "to": after}, message=message)
        self._alert(f"passk_guard: {after.upper()}", message)

    @quietly
    def outlook(self, step: int, line: Callable[[], str]) -> None:
        """One line on what this run can see; it is worked out on the first rank alone."""
        if self._speaks:
            self.info(f"passk_guard step {step}: {line()}")

    def _noise_of(self, probe: ProbeGram | None) -> Mapping[str, Any] | None:
        try:
            return self._noise(probe) if self._speaks and probe is not None else None
        except Exception as error:  # a plan can do without this refresh, its other numbers cannot
            self.warn(f"passk_guard: the noise of a refresh is missing in the journal: {type(error).__name__}: {error}")
            return None

    def _steps(self) -> Metrics:
        metrics = self._since_last()
        if metrics:
            self._journal.write("steps", self._trainer.state.global_step, **metrics)
        return metrics

    @quietly
    def void(self, step: int, reason: str, *, streak: int, alert_after: int) -> None:
        """A refresh without an estimate; after `alert_after` in a row an alert says that the guard is blind."""
        self._pace.forget()
        self._journal.write("void", step, reason=reason, streak=streak, alert=streak == alert_after)
        self.warn(void_refresh(step, reason))
        if streak == alert_after:
            self._alert("passk_guard: BLIND", blind(step, streak, reason))

    @quietly
    def warn(self, message: str) -> None:
        """One line of warning."""
        if self._speaks:
            logger.warning("%s", one_line(message))

    @quietly
    def info(self, message: str) -> None:
        """One line for those who ask for it."""
        if self._speaks:
            logger.info("%s", one_line(message))

    def _alert(self, title: str, message: str) -> None:
        self.warn(message)
        if self._speaks:
            send_alert(title, one_line(message), self._trainer.args.report_to or ())

    @property
    def _speaks(self) -> bool:
        return bool(self._trainer.state.is_world_process_zero)
