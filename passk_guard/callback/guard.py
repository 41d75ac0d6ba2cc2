"""The guard as a TrainerCallback: wiring only.

probe set --sample--> rollouts --score--> outcomes --sketch--> Gram matrix --estimate--> estimate --decide--> verdict
--report--> log rows, alerts, journal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from passk_guard.callback.mitigator import Mitigator
from passk_guard.callback.setup import Attachment, check_compatibility, check_groups, choose_verifier, held_out_source
from passk_guard.callback.state import Memory, load_memory, save_memory
from passk_guard.config import GuardConfig
from passk_guard.estimation.estimate import estimate_pooled
from passk_guard.estimation.evidence import conflict_score
from passk_guard.estimation.records import ConflictEstimate
from passk_guard.estimation.verdict import DecisionRule, decide
from passk_guard.mitigation.engines import untraced
from passk_guard.planning import outlook
from passk_guard.probe.held_out import HeldOut
from passk_guard.probe.progress import sampling_bar, wants_bar
from passk_guard.probe.records import Outcomes, Rollouts
from passk_guard.probe.refresh import Refresher
from passk_guard.probe.reuse import RolloutKeeper
from passk_guard.probe.rollout_checks import check_rollouts, limits_of, padding_token
from passk_guard.probe.samplers import BatchTap, Sampler
from passk_guard.reporting import Reporter
from passk_guard.sketch import ScoreSketcher
from passk_guard.utils.errors import FailedRefresh, GuardError
from passk_guard.utils.isolation import seeded, untouched
from passk_guard.utils.ranks import Ranks
from passk_guard.utils.text import describe_error


class PassKGuardCallback(TrainerCallback):
    """Watches the angle between the pass@k and the pass@1 gradient of a run, and changes nothing in it.

    Every `refresh_steps` optimizer steps, before the step, the guard samples fresh probe prompts, scores the
    completions, estimates cos(grad J_k, grad J_1) with its confidence interval (arXiv 2602.21189, Sec. 4), and
    reports: on the row of the loss, as one warning line when the verdict changes, in `passk_guard.jsonl`, and as an
    alert in wandb or trackio. Weights, losses, gradients and random states stay bit-for-bit as without it. A refresh
    that fails is void, with its reason in the log, and training goes on.

    Args:
        trainer: a transformers Trainer of a causal LM, or TRL's GRPOTrainer or RLOOTrainer.
        probe: held-out prompts: a ProbeSet, a list of rows, a JSONL path, or a datasets.Dataset, each row with
            `prompt` and the columns the reward function needs. Left out only with `source="training_batch"`.
        correct: the reward function that means *correct*, in TRL's signature, or the name of one of the trainer's.
        config: settings; the defaults otherwise.
        sampler: draws the completions; by default the TRL trainer's own generation, else `model.generate`.

    Raises:
        GuardError: misuse, each time with what to pass instead: no probe, probe prompts that are also in the
            training set, columns the reward function lacks, prompts longer than the context, no trainable parameter,
            an unknown reward function, or a training batch that cannot serve as probe.
    """

    def __init__(
        self,
        trainer: Any,
        probe: Any = None,
        correct: Any = None,
        config: GuardConfig | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        self.config = config or GuardConfig()
        self.memory = Memory()
        self.estimate: ConflictEstimate | None = None
        self._trainer = trainer
        self._attachment = Attachment(trainer, self, self._undo)
        self._max_tokens = self.config.max_probe_tokens
        self._keeper = RolloutKeeper(self.config.resample_refreshes, self.config.min_effective_samples)
        self._verifier = choose_verifier(trainer, correct, self.config)
        self._sketcher = self._new_sketcher()
        self._reporter = Reporter(
            trainer,
            held_out=self.config.source == "held_out",
            since_last=self._step_metrics,
            image_refreshes=self.config.image_refreshes,
            settings=asdict(self.config),
        )
        self._mitigator: Mitigator | None = None
        self._source: HeldOut | None = None
        self._tap: BatchTap | None = None
        if self.config.source == "training_batch":
            check_groups(trainer, self.config)
            self._tap = BatchTap(trainer, self._on_training_batch)
        else:
            self._source = held_out_source(trainer, probe, self._verifier, sampler, self.config)

    # Events of the Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bind to this train(): engines exist only now, and a resumed run has a past."""
        self._undo()  # a train() that raised never came to its end
        check_compatibility(
            self._trainer,
            self._source.sampler if self._source is not None else None,
            taps_batch=self._tap is not None,
            turns_gradients=self.config.mitigation in ("project", "both", "auto"),
        )
        self._attachment.claim()
        self._max_tokens = self.config.max_probe_tokens
        self._keeper.drop()
        self._reporter.open()
        if self._tap is not None:
            self._tap.install()
        self._ranks = Ranks(self._trainer.accelerator.device)
        self._sketcher = self._new_sketcher()
        self.memory = self._recall(args, state)
        self._mitigator = Mitigator(
            self._trainer, self.config, self._ranks, self._warn, lambda: self._attachment.stands
        )
        if state.global_step:
            self._mitigator.resume(_checkpoint(args, state), self.memory)
        self._announce()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refresh from the probe set, where this step is due."""
        if self._mitigator is None:  # added while training goes on
            self.on_train_begin(args, state, control)
        source = self._source
        if source is not None and state.global_step % self.config.refresh_steps == 0:
            number = state.global_step // self.config.refresh_steps
            self._refresh(state.global_step, lambda: self._sample(source, number), source.keys(number))
        if self._mitigator is not None:
            self._mitigator.apply(self.memory)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the guard's memory into the checkpoint; a resumed run has no rollouts, so this one drops its own."""
        self._keeper.drop()
        if state.is_world_process_zero:
            self._save(lambda folder: save_memory(self.memory, folder), _checkpoint(args, state))
        if self._mitigator is not None:
            self._save(self._mitigator.save, _checkpoint(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the trainer its methods back."""
        self._undo()

    # The picture at the top of this file

    def _refresh(
        self, step_number: int, sample: Callable[[], tuple[Rollouts, Outcomes]], keys: Sequence[Hashable]
    ) -> None:
        began = time.perf_counter()
        try:
            trainer, seed = self._trainer, self.config.probe_seed * 1_000_003 + step_number
            with untouched(trainer.model, trainer.processing_class), untraced(trainer.model_wrapped), seeded(seed):
                refresh = self._keeper.refresh(self._refresher(), sample, keys, seed)
                memory = self.memory.with_refresh(refresh.probe, self.config.pool_refreshes, step_number)
                estimate = self._ranks.together(lambda: self._estimate(memory))
                score = conflict_score(refresh.probe, self.config.k, threshold=self.config.threshold)
                if self._mitigator is not None:
                    memory = self._mitigator.react(refresh, estimate, memory)
        except Exception as error:  # whatever it was, training goes on
            self._void(step_number, str(error) if isinstance(error, FailedRefresh) else describe_error(error))
            return
        decision, evidence, verdict = decide(
            memory.decision, memory.evidence, estimate, score, self._rule, fresh=not refresh.probe.reused
        )
        knows = len(self.memory.history) < self.config.pool_refreshes == len(memory.history)  # once in a run
        self.memory, self.estimate = replace(memory, decision=decision, evidence=evidence), estimate
        extra = self._keeper.metrics() | (self._mitigator.refresh_metrics(memory) if self._mitigator else {})
        extra |= {"run_p_value": evidence.p_value, "probe_seconds": time.perf_counter() - began}
        self._reporter.refresh(step_number, estimate, verdict.status, extra, remark=refresh.remark, probe=refresh.probe)
        if knows:
            self._reporter.outlook(step_number, lambda: outlook(memory.history, self.config, extra["probe_seconds"]))
        if verdict.changed:
            self._reporter.change(
                step_number,
                estimate,
                before=verdict.previous,
                after=verdict.status,
                action=self._action(),
                run_p_value=evidence.p_value if self._rule.false_alarms is not None else None,
            )

    def _void(self, step_number: int, reason: str) -> None:
        self._keeper.drop()
        if self._mitigator is not None:
            self._mitigator.leave_unguarded()
        self.memory = self.memory.with_void(step_number)
        self._reporter.failed_refresh(
            step_number, reason, streak=self.memory.voids, alert_after=self.config.failed_refresh_alert
        )

    def _sample(self, source: HeldOut, number: int) -> tuple[Rollouts, Outcomes]:
        with sampling_bar(source.sampler, wants_bar(self.config.progress_bar, self._trainer)):
            rollouts = source.rollouts(number, self._ranks.index, self._ranks.count)
        check_rollouts(rollouts, **limits_of(self._trainer.accelerator.unwrap_model(self._trainer.model)))
        return rollouts, self._verifier.score(rollouts, trainer_state=self._trainer.state)

    def _on_training_batch(self, rollouts: Rollouts, rewards: torch.Tensor) -> None:
        step_number = self._trainer.state.global_step
        # Batches come when the trainer generates, which need not be on every step.
        if self.memory.step < 0 or step_number - self.memory.step >= self.config.refresh_steps:
            self._refresh(step_number, lambda: (rollouts, self._batch_outcomes(rollouts, rewards)), ())

    def _batch_outcomes(self, rollouts: Rollouts, rewards: torch.Tensor) -> Outcomes:
        """The trainer has scored its batch; the function is called again only when it is not one of the trainer's."""
        functions = list(self._trainer.reward_funcs)
        if self._verifier.function in functions:
            return self._verifier.outcomes(rewards[:, functions.index(self._verifier.function)])
        return self._verifier.score(rollouts, trainer_state=self._trainer.state)

    def _estimate(self, memory: Memory) -> ConflictEstimate:
        config = self.config
        try:
            probes = memory.pooled(config.pool_refreshes)
            return estimate_pooled(probes, config.k, threshold=config.threshold, confidence=config.confidence)
        except GuardError as error:  # the user has made no mistake here: this refresh is at fault
            raise FailedRefresh(str(error)) from error

    def _step_metrics(self) -> dict[str, float | None]:
        return self._mitigator.step_metrics() if self._mitigator is not None else {}

    @property
    def _rule(self) -> DecisionRule:
        over_the_run = self.config.alert_rule == "whole_run"
        allowed = 1 - self.config.confidence if over_the_run else None
        return DecisionRule(self.config.patience, self.config.cooldown, allowed)

    def _action(self) -> str:
        return self._mitigator.action(self.memory) if self._mitigator is not None else "observe"

    def _warn(self, reason: str) -> None:
        self._reporter.warn(f"passk_guard step {self._trainer.state.global_step}: {reason}")

    # Parts

    def _announce(self) -> None:
        config, remark = self.config, self._mitigator.remark if self._mitigator is not None else None
        what = "the training batch (not held out)" if self._source is None else self._source.summary
        what += f", drawn anew every {config.resample_refreshes} refreshes" if config.resample_refreshes > 1 else ""
        self._reporter.info(
            f"passk_guard watches cos(pass@1, pass@{config.k}) every {config.refresh_steps} steps on {what}; "
            f"the sketch covers {100 * self._sketcher.coverage.share:.1f}% of the trainable parameters; "
            f"action: {self._action()}" + (f" ({remark})" if remark else "")
        )

    def _refresher(self) -> Refresher:
        return Refresher(
            sketcher=self._sketcher,
            ranks=self._ranks,
            k=self.config.k,
            max_tokens=self._max_tokens,
            pad_token_id=padding_token(self._trainer.processing_class),
            autocast=self._trainer.accelerator.autocast,
            sample_fewer=getattr(getattr(self._source, "sampler", None), "sample_fewer", lambda: False),
            on_less_memory=self._use_fewer_tokens,
        )

    def _use_fewer_tokens(self, tokens: int) -> None:
        self._max_tokens = tokens
        self._warn(f"out of memory in the probe; from here on at most {tokens} tokens in one pass")

    def _save(self, write: Callable[[Path], None], folder: Path) -> None:
        try:
            write(folder)
        except Exception as error:  # a full disk above all, which torch reports as a RuntimeError
            self._warn(f"the checkpoint holds no memory of the guard: {describe_error(error)}")

    def _new_sketcher(self) -> ScoreSketcher:
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        return ScoreSketcher(model, self.config.sketch_dim, self.config.sketch_method)

    def _recall(self, args: Any, state: Any) -> Memory:
        if state.global_step == 0:
            return Memory()
        memory = load_memory(_checkpoint(args, state))
        # Ranks that do not share a disk would decide differently from here on.
        if self._ranks.max(int(memory is None)) or memory is None:
            self._reporter.warn(
                f"passk_guard step {state.global_step}: resumed without the guard's memory, starting afresh"
            )
            return Memory()
        return memory

    def _undo(self) -> None:
        self._attachment.release()
        self._reporter.close()
        if self._mitigator is not None:
            self._mitigator.remove()
            self._mitigator = None
        if self._tap is not None:
            self._tap.remove()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
