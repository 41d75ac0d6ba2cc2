"""Every way out of the guard in one place: log rows, log lines, journal, tracker alerts and pictures."""

from __future__ import annotations

import functools
import logging
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from passk_guard.estimation.power import measure_noise
from passk_guard.estimation.records import ConflictEstimate, ProbeGram, Status
from passk_guard.reporting.journal import JOURNAL_NAME, Journal, read_journal
from passk_guard.reporting.log_rows import LogRows, Metrics, estimate_metrics, state_change
from passk_guard.reporting.trackers import Images, Level, send_alert, show_settings
from passk_guard.reporting.webhook import Webhook
from passk_guard.utils.errors import GuardError
from passk_guard.utils.text import Once, describe_error, one_line

logger = logging.getLogger("passk_guard")

Method = TypeVar("Method", bound=Callable[..., None])
_LOGGED = "_logged_failures"
_PAPER = "Why pass@1 falls: arXiv 2602.21189, Sec. 4."
_OF_AN_ESTIMATE = (
    *("status", "reason", "k", "threshold", "confidence"),
    *("inner_product", "inner_product_se", "norm1_sq", "normk_sq", "weight_agreement_cov"),
)


class Spent:
    """Seconds in the probe, beside those of the whole run since it began in this process."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._began = clock, clock()
        self.seconds = 0.0

    def __str__(self) -> str:
        passed = max(self._clock() - self._began, 1e-9)
        return f"{_rounded(self.seconds)} of {_rounded(passed)} s in the probe ({self.seconds / passed:.0%})"


def _rounded(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}"


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
        settings: written into the journal and the trackers when a run starts; None writes nothing then.
        webhook: where alerts go besides.
        quiet: leaves out what is no change, no warning and no alert.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        held_out: bool,
        since_last: Callable[[], Metrics] = dict,
        image_refreshes: int = 0,
        settings: Mapping[str, Any] | None = None,
        webhook: str | None = None,
        quiet: bool = False,
    ) -> None:
        self._trainer = trainer
        self._held_out = held_out
        self._rows = LogRows(trainer, self._steps)
        self._since_last = since_last
        self._journal = Journal(None)
        self._images = Images(trainer, image_refreshes)
        self._settings = settings
        self._webhook = Webhook(webhook)
        self._quiet = quiet
        self._pace = Pace()
        self._spent = Spent()

    def open(self, facts: Callable[[], Mapping[str, Any]] = dict, run: str = "") -> None:
        """Start a run: complete log rows from here on, and append to `passk_guard.jsonl` in its output folder.

        Args:
            facts: gives what the journal says of the run beside the settings.
            run: its identity, which tells its events from those of another run in the same journal.

        Raises:
            GuardError: another guard reports on this trainer.
        """
        self._rows.install()
        self._pace.forget()
        self._spent = Spent()
        self._open_journal(facts, run)

    @quietly
    def _open_journal(self, facts: Callable[[], Mapping[str, Any]], run: str) -> None:
        folder = Path(self._trainer.args.output_dir)
        self._journal = Journal(folder / JOURNAL_NAME if self._reports else None)
        if self._settings is not None:
            step, settings = self._trainer.state.global_step, dict(self._settings)
            self._journal.write("start", step, settings=settings, run=run, **facts())
            if self._reports:
                show_settings(self._trainer, self._settings)

    @quietly
    def close(self) -> None:
        """Give the trainer its own `log` back."""
        self._rows.remove()
        self._webhook.finish()

    @quietly
    def spend(self, seconds: float) -> None:
        """Count what a refresh took, failed or not."""
        self._spent.seconds += seconds

    @quietly
    def end(self, step: int, found: str) -> None:
        """What a run found, the verdicts by their steps, its cost, and the command for the report."""
        if not self._reports or self._quiet:
            return
        path = self._journal.path
        self.say(f"passk_guard ends at step {step}: {found}; {self._verdicts()}; {self._spent}")
        if path is not None and path.is_file():
            self.say(f"passk_guard: the whole run on a page: passk-guard report {shlex.quote(str(path.parent))}")

    def _verdicts(self) -> str:
        try:
            journal = read_journal(self._trainer.args.output_dir)
        except GuardError:  # a disk that takes nothing
            return "its journal cannot be read"
        changes = [f"{event['to'].upper()} at step {event['step']}" for event in journal.of("state", "outcome")]
        failed, good = len(journal.of("failed_refresh")), len({e["step"] for e in journal.of("refresh", "change")})
        refreshes = f"{good} refresh{'' if good == 1 else 'es'}" + (f", {failed} more failed" if failed else "")
        return f"{', '.join(changes) or 'UNDETERMINED throughout'}; {refreshes}"

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
        objective: tuple[str, ConflictEstimate] | None = None,
    ) -> None:
        """Numbers of one refresh, with those of the mitigation in `extra`, for the next log row and the journal.

        With `probe`, the refresh's own, the journal has its noise, and prompts in the pictures run from easy to hard.
        `objective` is the name of what the run trains on, and its angle to pass@1.
        """
        metrics = estimate_metrics(estimate, verdict) | dict(extra)
        more = {}
        if objective is not None:
            name, own = objective
            metrics |= {
                "objective_cosine": own.cosine,
                "objective_cosine_ci_low": own.ci_low,
                "objective_cosine_ci_high": own.ci_high,
            }
            more = {"objective": {"name": name, "status": own.status, "reason": own.reason}}
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
            **more,
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
        advice: str = "",
        run_p_value: float | None = None,
    ) -> None:
        """A change of verdict: one warning line, one line in the journal, and an alert where CONFLICT begins or ends.

        `advice`, on what to do, is for a conflict that begins.
        """
        message = state_change(step, after, estimate, action, held_out=self._held_out, run_p_value=run_p_value)
        self._journal.write("state", step, **{"from": before, "to": after}, message=message)
        self._judged("conflict", before, after, message, advice)

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
    def outcome(self, step: int, *, before: str, after: str, message: str, advice: str = "") -> None:
        """A change of the verdict on the outcome: the same, and an alert where LOSING begins or ends."""
        message = f"passk_guard step {step}: {message}"
        self._journal.write("outcome", step, **{"from": before, "to": after}, message=message)
        self._judged("losing", before, after, message, advice)

    @quietly
    def loss(self, step: int, message: str, advice: str) -> None:
        """An alert: the loss of pass@1 is established to exceed `max_loss`."""
        self._alert("ERROR", "passk_guard: the loss exceeds max_loss", f"passk_guard step {step}: {message}", advice)

    @quietly
    def failed_refresh(self, step: int, reason: str, *, streak: int, alert_after: int, advice: str = "") -> None:
        """A refresh without an estimate, the last of `streak` in a row; `alert_after` in a row raise an alert."""
        self._pace.forget()
        self.status(-1.0)
        self._journal.write("failed_refresh", step, reason=reason, streak=streak, alert=streak == alert_after)
        self.warn(f"passk_guard step {step}: refresh failed: {reason}")
        if streak == alert_after:
            without = f"no valid refresh in the last {streak}"
            text = f"passk_guard step {step}: {without}; the last reason: {reason}"
            self._alert("WARN", f"passk_guard: {without}", text, advice)

    @quietly
    def status(self, value: float) -> None:
        """The standing verdicts as one number for the log row; -1 where a refresh has failed."""
        self._rows.add({"status": value})

    @quietly
    def outlook(self, step: int, line: Callable[[], str]) -> None:
        """One line on the power of this run; `line` is called on the first rank alone."""
        if self._reports:
            self.info(f"passk_guard step {step}: {line()}")

    @quietly
    def say(self, message: str) -> None:
        """One line that is seen where nobody has set up logging, unless the user wants it quiet."""
        if not self._quiet:
            self.warn(message)

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

    def _judged(self, alarm: str, before: str, after: str, message: str, advice: str) -> None:
        """A warning line, which is an alert too where the verdict that alarms begins or ends."""
        if after == alarm:
            level: Level = "ERROR" if alarm == "losing" else "WARN"
            self._alert(level, f"passk_guard: {after.upper()}", message, advice)
        elif before == alarm:
            self._alert("INFO", f"passk_guard: {before.upper()} is over, {after.upper()}", message)
        else:
            self.warn(message)

    def _alert(self, level: Level, title: str, message: str, advice: str = "") -> None:
        self.warn(message)
        if advice:
            self.warn(f"passk_guard: what to do: {advice}")
        if self._reports:
            to_do = f"What to do: {advice}" if advice else ""
            text = "\n".join(one_line(line) for line in (message, to_do, f"{level}; {self._spent}. {_PAPER}") if line)
            send_alert(title, text, self._trainer.args.report_to or (), level)
            self._webhook.send(f"{title}\n{text}")

    @property
    def _reports(self) -> bool:
        return bool(self._trainer.state.is_world_process_zero)
