"""The guard as a TrainerCallback: the Trainer's events, and one refresh from the prompts to the report.

probe set --sample--> rollouts --score--> outcomes --sketch--> Gram matrix --estimate--> estimate --decide--> verdict
--report--> log rows, alerts, journal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainerCallback

from passk_guard.callback.budget import Meter, probe_size, tokens_of
from passk_guard.callback.facts import facts_of
from passk_guard.callback.mitigator import Mitigator, NoMitigation
from passk_guard.callback.objective_angle import measure_objective
from passk_guard.callback.realised import ChangeMemory, RealisedChange, WindowResult
from passk_guard.callback.resumed import recall
from passk_guard.callback.setup import (
    Attachment,
    check_compatibility,
    check_groups,
    choose_metric,
    choose_verifier,
    held_out_source,
    refuse_no_trainer,
    refuse_what_passes_cannot_read,
)
from passk_guard.callback.state import Memory, save_memory
from passk_guard.callback.voice import Voice
from passk_guard.config import GuardConfig
from passk_guard.estimation.estimate import estimate_pooled
from passk_guard.estimation.evidence import conflict_check
from passk_guard.estimation.records import ConflictEstimate
from passk_guard.estimation.verdict import DecisionRule, Verdict, decide
from passk_guard.mitigation.engines import untraced
from passk_guard.mitigation.hold_guard import makes_advantages
from passk_guard.planning import Cost, decision_rule, outlook
from passk_guard.probe.out_of_memory import until_it_fits
from passk_guard.probe.pass_memory import FEWEST_TOKENS, choose_tokens, passes_of
from passk_guard.probe.passes import Scorer, SharedPrompts
from passk_guard.probe.progress import sampling_bar, wanted
from passk_guard.probe.prompts import HeldOut
from passk_guard.probe.records import Outcomes, Rollouts, check_rollouts, limits_of, padding_token
from passk_guard.probe.refresh import Refresh, Refresher
from passk_guard.probe.rescoring import Rescorer, precision_of
from passk_guard.probe.reuse import RolloutKeeper
from passk_guard.probe.samplers import BatchTap, Sampler
from passk_guard.reporting import Reporter
from passk_guard.sketch import ScoreSketcher
from passk_guard.utils.errors import FailedRefresh, GuardError
from passk_guard.utils.isolation import seeded, untouched
from passk_guard.utils.ranks import Ranks
from passk_guard.utils.text import describe_error


@dataclass(frozen=True)
class _Angle:
    """What the angle says in one refresh, that of the run's own objective by name, and the memory after it."""

    refresh: Refresh
    estimate: ConflictEstimate
    objective: tuple[str, ConflictEstimate] | None
    verdict: Verdict
    memory: Memory


class PassKGuardCallback(TrainerCallback):
    """Watch the angle between the pass@k and the pass@1 gradient of a run, and change nothing in it.

    As often as the budget `overhead` allows, before an optimizer step, the guard samples fresh probe prompts, scores
    the completions and estimates cos(grad J_k, grad J_1) with its confidence interval (arXiv 2602.21189, Sec. 4). It
    reports on the row of the loss, in one warning line when the verdict changes, in `passk_guard.jsonl`, and in an
    alert of wandb or trackio. Weights, losses, gradients and random states stay bit-for-bit as without it. When a
    refresh fails, the log gives the reason and training goes on.

    `watch` makes one and adds it in one line. Made without a trainer, for `callbacks=[...]`, it waits until a
    PassKObjective is installed on its trainer, or `bind` is called.

    Args:
        trainer: a transformers Trainer of a causal LM, or TRL's GRPOTrainer or RLOOTrainer.
        probe: held-out prompts: a ProbeSet, a list of rows, a JSONL path, or a datasets.Dataset, each row with
            `prompt` and the columns the reward function needs. Left out only with `source="training_batch"`.
        correct: the reward function that means *correct*, in TRL's signature, or the name of one of the trainer's.
        config: settings, as a GuardConfig, a mapping or the path of a YAML file; the defaults otherwise.
        sampler: samples the completions; by default the TRL trainer's own generation, else `model.generate`.
        settings: of the config, by name, such as k=8.

    Raises:
        GuardError: misuse, each time with what to pass instead: no probe, probe prompts that are also in the
            training set, columns the reward function lacks, prompts longer than the context, no trainable parameter,
            an unknown reward function, or a training batch that cannot serve as probe.
    """

    def __init__(
        self,
        trainer: Any = None,
        probe: Any = None,
        correct: Any = None,
        config: GuardConfig | Mapping[str, Any] | str | Path | None = None,
        sampler: Sampler | None = None,
        **settings: Any,
    ) -> None:
        self.config = GuardConfig.of(config, **settings)
        self.memory = Memory()
        self.estimate: ConflictEstimate | None = None
        self._training = False
        self._trainer: Any = None
        self._given = probe, correct, sampler
        if trainer is not None:
            self.bind(trainer)

    @property
    def waits(self) -> bool:
        """Whether it has no trainer yet."""
        return self._trainer is None

    def bind(self, trainer: Any) -> None:
        """Become the guard of this trainer, where it was made without one. Raises GuardError as the constructor."""
        refuse_no_trainer(trainer)
        refuse_what_passes_cannot_read(trainer, angle=self.config.instruments != "change")
        probe, correct, sampler = self._given
        self._trainer = trainer
        self._attachment = Attachment(trainer, self)
        self._mitigator: Mitigator | NoMitigation = NoMitigation()
        self._max_tokens = FEWEST_TOKENS  # until a run begins
        self._keeper = RolloutKeeper(self.config.resample_refreshes, self.config.min_effective_samples)
        self._verifier = choose_verifier(trainer, correct, self.config)
        self._metric = choose_metric(trainer, self._verifier, self.config)
        self._meter = Meter(trainer)
        self._sketcher = None if self.config.instruments == "change" else self._new_sketcher()
        self._reporter = Reporter(
            trainer,
            held_out=self.config.source == "held_out",
            since_last=lambda: self._mitigator.step_metrics(),
            image_refreshes=self.config.image_refreshes,
            settings=self.config.shown,
            webhook=self.config.alert_webhook,
            quiet=self.config.verbosity == "quiet",
        )
        self._source: HeldOut | None = None
        self._tap: BatchTap | None = None
        if self.config.source == "training_batch":
            check_groups(trainer, self.config)
            self._tap = BatchTap(trainer, self._on_training_batch)
        else:
            self._source = held_out_source(trainer, probe, self._verifier, sampler, self.config, self._metric)
        self._change = RealisedChange(self._source, self.config)
        self._voice = Voice(trainer, self._verifier, self.config, self._reporter)

    # Events of the Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare for this train(): engines exist only now, and a resumed run has a past."""
        if self.waits:
            refuse_no_trainer(None)
        self.detach()  # a train() that raised has not reached its end
        check_compatibility(
            self._trainer,
            self._source.sampler if self._source is not None else None,
            taps_batch=self._tap is not None,
        )
        self._attachment.claim()
        self._training = True
        self._keeper.drop()
        self._ranks = Ranks(self._trainer.accelerator.device)
        self.memory, folder = recall(self._trainer, args, state, self._ranks, self._warn)
        as_before = self.memory.change.metric.name == self.config.hold_metric
        if not as_before:
            self.memory = self.memory.holding(self.config.hold_metric)
        self._reporter.open(lambda: facts_of(self._trainer, self._source), self.memory.run)
        if self._tap is not None:
            self._tap.install()
        self._sketcher = None if self.config.instruments == "change" else self._new_sketcher()
        accelerator, pad = self._trainer.accelerator, padding_token(self._trainer.processing_class)
        model = accelerator.unwrap_model(self._trainer.model)
        self._shared = SharedPrompts(Scorer(model, self._ranks, pad, accelerator.autocast))
        self._check_coverage()
        self._change.drop()
        self._meter.install()
        if self._source is not None:
            size = probe_size(self._trainer, self.config, state.max_steps)
            self._source = replace(self._source, size=size)
        direction = self.config.mitigation in ("project", "both", "auto") or self._held_by_gradient
        chosen = self.config.max_probe_tokens or self.memory.pass_tokens  # which a resumed run keeps to
        self._max_tokens = chosen or choose_tokens(model, self._ranks, direction=direction)
        self.memory = replace(self.memory, pass_tokens=self._max_tokens)
        self._mitigator = Mitigator(
            self._trainer,
            self.config,
            self._ranks,
            self._warn,
            lambda: self._attachment.stands,
            self._verifier.function,
        )
        if folder is not None:
            self._mitigator.resume(folder, self.memory)
            if as_before:  # the window has the scores of what was held then
                self._change.resume(folder, self._ranks)
        coverage = None if self._sketcher is None else self._sketcher.coverage.share
        passes = passes_of(self._max_tokens, model, direction=direction)
        self._voice.begin(self.memory, self._mitigator, self._source, coverage, passes)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refresh from the probe set when this step is due."""
        if not self._training:  # the guard was added in the middle of train()
            self.on_train_begin(args, state, control)
        source, number = self._source, self._due(state.global_step)
        if source is not None and number is not None:
            self._refresh(state.global_step, lambda: self._sample(source, number), source.keys(number), control)
        self._mitigator.apply(self.memory)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the guard's memory into the checkpoint.

        Kept rollouts are dropped, because a resumed run has none and must sample at the same refreshes.
        """
        self._keeper.drop()
        self._settle()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            self._save(lambda folder: save_memory(self.memory, folder), folder)
        self._save(self._mitigator.save, folder)
        self._save(lambda folder: self._change.save(folder, self._ranks.index), folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the trainer its methods back, and say what was found."""
        if self._training:
            self._settle()
            self._voice.end(state.global_step, self.memory)
        self.detach()

    def detach(self) -> None:
        """Leave no patch on the trainer, its objective and its engine; the next train() puts them back."""
        self._training = False
        if self.waits:
            return
        self._attachment.release()
        self._reporter.close()
        self._meter.remove()
        self._mitigator.remove()
        self._mitigator = NoMitigation()
        if self._tap is not None:
            self._tap.remove()

    # When a refresh is due

    def _due(self, step: int) -> int | None:
        """The number of the refresh that is due before this step; None where none is."""
        every = self.config.refresh_steps
        if every is not None:
            return step // every if step % every == 0 else None
        return self.memory.account.refreshes if self._affords(step) else None

    def _affords(self, step: int) -> bool:
        """Whether the budget has room for a refresh; all ranks ask at the same steps."""
        overhead, account = self.config.overhead, self.memory.account
        if step < account.due:
            return False
        account, _ = self._meter.settle(account, self._ranks)
        allowed = account.allows(step, overhead)
        self.memory = replace(self.memory, account=account if allowed else account.planned(step, overhead))
        if not allowed:
            self._voice.cadence(step, account)
        return allowed

    def _settle(self, step: int | None = None, *, failed: bool = False) -> int:
        """Bring the account up to date, with a refresh at `step` if there was one; every rank calls this.

        Returns:
            On how many ranks the refresh failed, the same on each.
        """
        account, failures = self._meter.settle(self.memory.account, self._ranks, failed=failed)
        if step is not None:
            account = account.after_refresh(step, self.config.overhead, failed=failures > 0)
        self.memory = replace(self.memory, account=account)
        return failures

    # One refresh

    def _refresh(
        self,
        step: int,
        sample: Callable[[], tuple[Rollouts, Outcomes]],
        keys: Sequence[Hashable],
        control: Any = None,
    ) -> None:
        """Measure, mitigate, decide and report; training is unchanged by any failure."""
        began = time.perf_counter()
        trainer, seed = self._trainer, self.config.probe_seed * 1_000_003 + step
        try:
            with untouched(trainer.model, trainer.processing_class), untraced(trainer.model_wrapped), seeded(seed):
                window, rescorer = None, self._rescorer()
                if self._change.enabled:
                    window = self._change.look(rescorer, self.memory.change, step)
                sampled = list[tuple[Rollouts, Outcomes]]()

                def sample_once() -> tuple[Rollouts, Outcomes]:
                    sampled[:] = [sample()]
                    return sampled[0]

                found = None
                if self._sketcher is not None:
                    found = self._angle(sample_once, self._source.independent(keys) if self._source else (), seed, step)
                else:
                    until_it_fits(self._ranks, lambda: self._ranks.together(sample_once), self._sample_fewer)
                memory = self.memory.with_step(step) if found is None else found.memory
                if self._change.enabled and sampled:  # kept samples go on with the window that they have
                    memory = self._ranks.together(partial(self._mitigator.follow, memory, window))
                    before = memory.change if window is None else window.memory
                    memory = memory.with_change(self._opened(rescorer, sampled[0], keys, before, step))
            scorings = (window is not None) + (rescorer.scorings if sampled else 0)
            trained = 0 if found is None else tokens_of(found.refresh.batches) * (1 + self._harvests)
            self._meter.charge(trained, self._change.tokens * scorings)
            failed = None
        except Exception as error:  # of any kind: the probe may not stop training
            failed = str(error) if isinstance(error, FailedRefresh) else describe_error(error)
        failures = self._settle(step, failed=failed is not None)
        if failures:
            if failures < self._ranks.count:  # after the last stage that they do together: windows may differ
                self._change.drop()
            self._reporter.spend(time.perf_counter() - began)
            self._fail(step, failed or "it failed on another rank, which said why there")
            return
        pool_filled = len(self.memory.history) < self.config.pool_refreshes == len(memory.history)  # once in a run
        self.memory = replace(memory, account=self.memory.account)
        seconds = time.perf_counter() - began
        self._reporter.spend(seconds)
        if found is not None:
            self.estimate = found.estimate
            self._report(step, found, seconds)
        if window is not None:
            self._report_window(window if sampled else window.unfinished(), control, seconds)
        self._reporter.status(self.memory.status)
        angle = (None, seconds) if found is None else (found.estimate, seconds, found.objective)
        self._voice.refreshed(step, memory, *angle)
        if found is not None and pool_filled and found.verdict.status == "undetermined":
            self._voice.pool_is_full(step, found.estimate)
        if pool_filled:
            cost = Cost(seconds, None, self.memory.account.cadence(step, self.config.overhead))
            self._reporter.outlook(step, lambda: outlook(memory.history, self.config, cost))

    def _angle(
        self, sample: Callable[[], tuple[Rollouts, Outcomes]], keys: Sequence[Hashable], seed: int, step: int
    ) -> _Angle:
        """The cosine of the two gradients, what is done about it, and the verdict."""
        config = self.config
        refresh = self._keeper.refresh(self._refresher(), sample, keys, seed)
        memory = self.memory.with_refresh(refresh.probe, config.pool_refreshes, step)
        estimate = self._ranks.together(lambda: self._estimate(memory))
        share = 0.0 if self._source is None else self._source.share
        return self._ranks.together(lambda: self._decided(refresh, estimate, memory, share))

    def _decided(self, refresh: Refresh, estimate: ConflictEstimate, memory: Memory, share: float) -> _Angle:
        config = self.config
        memory = self._mitigator.react(refresh, estimate, memory)
        check = conflict_check(refresh.probe, config.k, threshold=config.threshold, share=share)
        decision, evidence, verdict = decide(
            memory.decision, memory.evidence, estimate, check, self._rule, fresh=not refresh.probe.reused
        )
        objective = measure_objective(self._trainer, self._verifier, memory.pooled(config.pool_refreshes), config)
        return _Angle(refresh, estimate, objective, verdict, replace(memory, decision=decision, evidence=evidence))

    def _sample(self, source: HeldOut, number: int) -> tuple[Rollouts, Outcomes]:
        """This rank's completions of refresh `number`, checked and scored."""
        shown = wanted(self.config.progress_bar, self._ranks, quiet=self._trainer.args.disable_tqdm)
        try:
            with sampling_bar(source.sampler, shown):
                rollouts = source.rollouts(number, self._ranks.index, self._ranks.count)
            self._meter.charge_sampling(rollouts)
            check_rollouts(rollouts, **limits_of(self._trainer.accelerator.unwrap_model(self._trainer.model)))
            outcomes = self._verifier.score(rollouts, trainer_state=self._trainer.state)
            if (metric := self._metric) is not None:
                same = metric is self._verifier
                scored = outcomes if same else metric.score(rollouts, trainer_state=self._trainer.state)
                outcomes = outcomes.with_scores(scored)
        finally:
            getattr(source.sampler, "finish", lambda: None)()
        return replace(rollouts, columns={}), outcomes

    def _on_training_batch(self, rollouts: Rollouts, rewards: torch.Tensor) -> None:
        """Refresh from a batch that the trainer has generated, which it need not do on every step."""
        step, every = self._trainer.state.global_step, self.config.refresh_steps
        due = self._affords(step) if every is None else step - self.memory.step >= every
        if self.memory.step < 0 or due:
            self._refresh(step, lambda: (rollouts, self._batch_outcomes(rollouts, rewards)), ())

    def _batch_outcomes(self, rollouts: Rollouts, rewards: torch.Tensor) -> Outcomes:
        """The trainer's own rewards where `correct` is one of its functions, else those of another call."""
        functions = list(self._trainer.reward_funcs)
        if self._verifier.function in functions:
            return self._verifier.outcomes(rewards[:, functions.index(self._verifier.function)])
        return self._verifier.score(rollouts, trainer_state=self._trainer.state)

    def _refresher(self) -> Refresher:
        return Refresher(
            sketcher=cast(ScoreSketcher, self._sketcher),
            ranks=self._ranks,
            k=self.config.k,
            max_tokens=self._max_tokens,
            pad_token_id=padding_token(self._trainer.processing_class),
            autocast=self._trainer.accelerator.autocast,
            sample_fewer=self._sample_fewer,
            on_less_memory=self._use_fewer_tokens,
            shared=self._shared,
        )

    def _opened(
        self,
        rescorer: Rescorer,
        sampled: tuple[Rollouts, Outcomes],
        keys: Sequence[Hashable],
        memory: ChangeMemory,
        step: int,
    ) -> ChangeMemory:
        try:
            return self._change.open(rescorer, sampled, keys, memory, step, self._mitigator.measured(len(keys)))
        except FailedRefresh as error:  # on all ranks alike
            self._warn(f"no window of the realised change begins here: {error}")
            return memory

    def _rescorer(self) -> Rescorer:
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        return Rescorer(
            model=model,
            ranks=self._ranks,
            max_tokens=self._max_tokens,
            pad_token_id=padding_token(self._trainer.processing_class),
            vocabulary=limits_of(model)["vocabulary"],
            autocast=self._trainer.accelerator.autocast,
            precision=precision_of(model, self._trainer.accelerator.mixed_precision),
            shared=self._shared,
        )

    def _sample_fewer(self) -> bool:
        return bool(getattr(getattr(self._source, "sampler", None), "sample_fewer", lambda: False)())

    def _use_fewer_tokens(self, tokens: int) -> None:
        self._max_tokens = tokens
        self._warn(f"out of memory in the probe; from here on at most {tokens} tokens in one pass")

    def _estimate(self, memory: Memory) -> ConflictEstimate:
        config = self.config
        try:
            probes = memory.pooled(config.pool_refreshes)
            return estimate_pooled(probes, config.k, threshold=config.threshold, confidence=config.confidence)
        except GuardError as error:  # not a mistake of the user's: this refresh is at fault
            raise FailedRefresh(str(error)) from error

    def _report(self, step: int, found: _Angle, seconds: float) -> None:
        refresh, estimate, verdict = found.refresh, found.estimate, found.verdict
        p_value = self.memory.evidence.p_value
        extra = self._keeper.metrics() | self._mitigator.refresh_metrics(self.memory)
        extra |= {"run_p_value": p_value, "probe_seconds": seconds, "probe_share": self.memory.account.share}
        extra |= {"weighted_prompts": refresh.probe.share_weighted(self.config.k)}
        more: dict[str, Any] = {"remark": refresh.remark, "probe": refresh.probe, "objective": found.objective}
        self._reporter.refresh(step, estimate, verdict.status, extra, **more)
        if verdict.changed:
            self._reporter.change(
                step,
                estimate,
                before=verdict.previous,
                after=verdict.status,
                action=self._mitigator.action(self.memory),
                advice=self._voice.what_to_do("conflict", self._mitigator),
                run_p_value=p_value if self._rule.false_alarms is not None else None,
            )

    def _report_window(self, window: WindowResult, control: Any, seconds: float) -> None:
        """Report what the updates did; end the training where the user asked for it."""
        details = window.details(self._change.prompt)
        metrics = window.metrics | self._mitigator.refresh_metrics(self.memory)
        metrics |= {"probe_seconds": seconds, "probe_share": self.memory.account.share}
        metrics |= {} if self._sketcher is not None else self._change.mismatch  # the angle's row has it
        if self.memory.hold is not None:
            details["hold_cause"] = self.memory.hold.cause
        self._reporter.window(window.ended, metrics, remark=window.reason, **details)
        if window.verdict.changed:
            action = self._mitigator.action(self.memory)
            before, after = window.verdict.previous, window.verdict.outcome
            message, advice = window.message(action), self._voice.what_to_do("losing", self._mitigator)
            self._reporter.outcome(window.ended, before=before, after=after, message=message, advice=advice)
        self._voice.window(window)
        stops = window.verdict.exceeded and self.config.on_loss == "stop" and control is not None
        if stops:
            control.should_training_stop = True
        if window.verdict.newly or stops:
            loss = window.run.pass_at_1
            told = f"pass@1 {loss.total:+.3f} [{loss.ci_low:+.3f}, {loss.ci_high:+.3f}] since the start"
            exceeds = f"the loss of pass@1 exceeds max_loss={self.config.max_loss:g}: {told}"
            message = f"training stops: {exceeds}" if stops else exceeds
            self._reporter.loss(window.ended, message, self._voice.what_to_do("losing", self._mitigator))

    def _fail(self, step: int, reason: str) -> None:
        """Report a failed refresh; nothing is projected until the next one succeeds."""
        self._keeper.drop()
        self._mitigator.leave_unguarded()
        self.memory = self._mitigator.missed(self.memory.with_failure(step))
        self._reporter.failed_refresh(
            step,
            reason,
            streak=self.memory.failures,
            alert_after=self.config.failed_refresh_alert,
            advice=self._voice.what_to_do("blind", self._mitigator),
        )

    # Parts

    @property
    def _harvests(self) -> bool:
        """Whether a refresh takes the direction to protect: one more pass over its batches."""
        return self._mitigator.steps is not None and self._mitigator.steps.open

    @property
    def _held_by_gradient(self) -> bool:
        """Whether hold adds the direction to protect, as the trainer has no advantages to add to."""
        return self.config.mitigation == "hold" and not makes_advantages(self._trainer)

    @property
    def _rule(self) -> DecisionRule:
        return decision_rule(self.config)

    def _new_sketcher(self) -> ScoreSketcher:
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        return ScoreSketcher(model, self.config.sketch_dim, self.config.sketch_method)

    def _check_coverage(self) -> None:
        """Give the angle up where the sketch sees too little of the gradient; raise GuardError where it is needed."""
        trainer, sketcher = self._trainer, self._sketcher
        if sketcher is None:
            return
        try:
            with untouched(trainer.model), untraced(trainer.model_wrapped), trainer.accelerator.autocast():
                self._ranks.together(lambda: sketcher.settle(self._ranks.device))
        except FailedRefresh as error:  # the first refresh will say so again
            self._warn(f"which parameters the sketch sees could not be checked: {error}")
            return
        try:
            sketcher.require_coverage()  # it depends on the model's code alone, so that all ranks agree
        except GuardError as error:
            steers = self.config.mitigation not in ("off", "hold") or self._held_by_gradient
            if not self._change.enabled or self.config.instruments != "both" or steers:
                raise
            self._sketcher = None
            self._warn(f"the angle is not measured in this run, the change of pass@1 and pass@k is. {error}")

    def _warn(self, reason: str) -> None:
        self._reporter.warn(f"passk_guard step {self._trainer.state.global_step}: {reason}")

    def _save(self, write: Callable[[Path], None], folder: Path) -> None:
        try:
            write(folder)
        except Exception as error:  # a full disk above all, which torch reports as a RuntimeError
            self._warn(f"the checkpoint holds no memory of the guard: {describe_error(error)}")
