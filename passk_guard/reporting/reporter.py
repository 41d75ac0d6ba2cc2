"""Every way out of the guard in one place: log rows, log lines, journal, tracker alerts and pictures."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from passk_guard.estimation.power import measure_noise
from passk_guard.estimation.records import ConflictEstimate, ProbeGram, Status
from passk_guard.reporting.journal import JOURNAL_NAME, Journal
from passk_guard.reporting.log_rows import LogRows, Metrics, estimate_metrics, state_change
from passk_guard.reporting.trackers import Images, send_alert
from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import Once, describe_error, one_line

logger = logging.getLogger("passk_guard")

Method = TypeVar("Method", bound=Callable[..., None])
_LOGGED = "_logged_failures"
_OF_AN_ESTIMATE = (
    *("status", "reason", "k", "threshold", "confidence"),
    *("inner_product", "inner_product_se", "norm1_sq", "normk_sq", "weight_agreement_cov"),
)


class Pace:
    """Seconds of a training step, from the end of one refresh to the beginning of the next; `clock` may be any."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since: tuple[int, float] | None = None

    def forget(self) -> None:
        """What happens from here on is no training: a run that begins, or a refresh of unknown length."""
        self._since = None

    def arrive(self, step: int, probe_seconds: float | None) -> float | None:
        """Seconds a step since `leave`, less the refresh that has just taken `probe_seconds`; None where unknown."""
        if self._since is None or probe_seconds is None or step <= self._since[0]:
            return None
        return max(0.0, self._clock() - self._since[1] - probe_seconds) / (step - self._since[0])

    def leave(self, step: int) -> None:
        """A refresh before this step is over."""
        self._since = step, self._clock()


def quietly(method: Method) -> Method:
    """Of a method: its exceptions, but for a GuardError, are logged once each for an object and go no further.

    Reporting must not stop training. Not even the log is relied on: a handler of the user's, which sends lines
    elsewhere, may be what fails.
    """

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            method(self, *args, **kwargs)
        except GuardError:
            raise
        except Exception as error:
            reason = f"{method.__name__}: {describe_error(error)}"
            logged: Once = vars(self).setdefault(_LOGGED, Once())
            if logged.new(reason):
                with suppress(Exception):
                    logger.warning("passk_guard: part of a report is missing (%s)", reason)

    return cast(Method, guarded)


class Reporter:
    """Reports to the user, on the first rank alone. Nothing that fails in here reaches training.

    Args:
        trainer: whose log rows are completed, and whose `report_to` names the trackers.
        held_out: False where the numbers describe the training batch, which every line then names.
        since_last: called at each log row for the numbers of the steps since the row before.
        image_refreshes: refreshes between pictures of the kernel in the trackers; 0 sends none.
        settings: written into the journal when a run starts; None writes nothing then.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        held_out: bool,
        since_last: Callable[[], Metrics] = dict,
        image_refreshes: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._trainer = trainer
        self._held_out = held_out
        self._rows = LogRows(trainer, self._steps)
        self._since_last = since_last
        self._journal = Journal(None)
        self._images = Images(trainer, image_refreshes)
        self._settings = settings
        self._pace = Pace()

    def open(self, run: str = "") -> None:
        """Start a run: complete log rows from here on, and append to `passk_guard.jsonl` in its output folder.

        `run` is its identity, which tells its events from those of another run in the same journal.

        Raises:
            GuardError: another guard reports on this trainer.
        """
        self._rows.install()
        self._pace.forget()
        self._open_journal(run)

    @quietly
    def _open_journal(self, run: str) -> None:
        folder = Path(self._trainer.args.output_dir)
        self._journal = Journal(folder / JOURNAL_NAME if self._reports else None)
        if self._settings is not None:
            self._journal.write("start", self._trainer.state.global_step, settings=dict(self._settings), run=run)

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

        With `probe`, the refresh's own, the journal has its noise, and prompts in the pictures run from easy to hard.
        """
        metrics = estimate_metrics(estimate, verdict) | dict(extra)
        self._rows.put(metrics)
        self._journal.write(
            "refresh",
            step,
            verdict=verdict,
            refreshes=estimate.num_refreshes,
            prompts=estimate.num_prompts,
            informative=estimate.num_informative,
            held_out=self._held_out,
            remark=remark,
            **{name: getattr(estimate, name) for name in _OF_AN_ESTIMATE},
            step_seconds=self._pace.arrive(step, metrics.get("probe_seconds")),
            noise=self._noise(probe, estimate.k),
            **metrics,
        )
        if remark:
            self.warn(f"passk_guard step {step}: {remark}")
        if self._reports:
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
    def window(self, step: int, metrics: Metrics, *, remark: str | None, **details: Any) -> None:
        """The realised change of the steps since the last sample, for the next log row and the journal.

        Args:
            step: at which the window ended.
            metrics: numbers for the log row.
            remark: why the window has no estimate, where it has none.
            details: what the journal holds besides.
        """
        self._rows.add(metrics)
        self._journal.write("change", step, remark=remark, **metrics, **details)
        if remark:
            self.warn(f"passk_guard step {step}: no realised change: {remark}")

    @quietly
    def outcome(self, step: int, *, before: str, after: str, message: str) -> None:
        """A change of the verdict on the outcome: one warning line, one line in the journal, an alert for a loss."""
        message = f"passk_guard step {step}: {message}"
        self._journal.write("outcome", step, **{"from": before, "to": after}, message=message)
        if after == "losing":
            self._alert("passk_guard: LOSING", message)
        else:
            self.warn(message)

    @quietly
    def failed_refresh(self, step: int, reason: str, *, streak: int, alert_after: int) -> None:
        """A refresh without an estimate, the last of `streak` in a row; `alert_after` in a row raise an alert."""
        self._pace.forget()
        self._journal.write("failed_refresh", step, reason=reason, streak=streak, alert=streak == alert_after)
        self.warn(f"passk_guard step {step}: refresh failed: {reason}")
        if streak == alert_after:
            without = f"no valid refresh in the last {streak}"
            self._alert(f"passk_guard: {without}", f"passk_guard step {step}: {without}; the last reason: {reason}")

    @quietly
    def outlook(self, step: int, line: Callable[[], str]) -> None:
        """One line on the power of this run; `line` is called on the first rank alone."""
        if self._reports:
            self.info(f"passk_guard step {step}: {line()}")

    @quietly
    def warn(self, message: str) -> None:
        """One line of warning."""
        if self._reports:
            logger.warning("%s", one_line(message))

    @quietly
    def info(self, message: str) -> None:
        """One line at level INFO."""
        if self._reports:
            logger.info("%s", one_line(message))

    def _noise(self, probe: ProbeGram | None, k: int) -> Mapping[str, Any] | None:
        """What a plan is made from, as plain numbers; None where a refresh has none."""
        try:
            noise = measure_noise(probe, k) if self._reports and probe is not None else None
            return None if noise is None else noise.to_dict()
        except Exception as error:  # a plan can do without this refresh, its other numbers cannot
            self.warn(f"passk_guard: the noise of a refresh is missing in the journal: {describe_error(error)}")
            return None

    def _steps(self) -> Metrics:
        metrics = self._since_last()
        if metrics:
            self._journal.write("steps", self._trainer.state.global_step, **metrics)
        return metrics

    def _alert(self, title: str, message: str) -> None:
        self.warn(message)
        if self._reports:
            send_alert(title, one_line(message), self._trainer.args.report_to or ())

    @property
    def _reports(self) -> bool:
        return bool(self._trainer.state.is_world_process_zero)
