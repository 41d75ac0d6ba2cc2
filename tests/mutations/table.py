"""For each fault the handling that is taken away, and the test that must then fail."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """`old`, which stands once in passk_guard/`file`, becomes `new`; `test` is a pytest id below tests/."""

    fault: str
    file: str
    old: str
    new: str
    test: str


PROBE, LIFE = "faults/test_probe_faults.py::", "faults/test_life_of_a_trainer.py::"
MEMORY, REPORT = "faults/test_memory_faults.py::", "faults/test_report_faults.py::"
KEPT = "test_kept_rollouts.py::"
MUTATIONS = (
    Mutation(
        "verifier raises",
        "scoring.py",
        "if len(errors) == len(results):",
        "if not results:",
        f"{PROBE}test_verifiers[raises-project]",
    ),
    Mutation(
        "verifier hangs",
        "scoring.py",
        "= self._limit.call(lambda: self._call(rollouts, scored, trainer_state))",
        "= self._call(rollouts, scored, trainer_state)",
        f"{PROBE}test_verifiers[hangs-project]",
    ),
    Mutation(
        "verifier returns NaN",
        "scoring.py",
        "known = ~values.isnan()",
        "known = torch.ones_like(values, dtype=torch.bool)",
        f"{PROBE}test_verifiers[not_numbers-project]",
    ),
    Mutation(
        "verifier returns strings",
        "scoring.py",
        "        except (TypeError, ValueError, RuntimeError, OverflowError):\n            odd",
        "        except MemoryError:\n            odd",
        f"{PROBE}test_verifiers[texts-project]",
    ),
    Mutation(
        "generation returns nothing",
        "rollout_checks.py",
        "if len(rollouts) and not any(",
        "if False and not any(",
        f"{PROBE}test_generation[no tokens]",
    ),
    Mutation(
        "generation returns overlong text",
        "rollout_checks.py",
        "if context is not None and length > context:",
        "if False:",
        f"{PROBE}test_generation[overlong]",
    ),
    Mutation(
        "inner products are not finite",
        "refresh.py",
        "if not bool(torch.stack(gram.aminmax()).isfinite().all()):",
        "if False:",
        f"{PROBE}test_logits_that_are_not_finite_in_the_sketch",
    ),
    Mutation(
        "training gradient is not finite",
        "step_guard.py",
        "if plan.reason is not None:",
        "if False:",
        f"{PROBE}test_training_gradients_that_are_not_finite_are_left_to_the_optimizer",
    ),
    Mutation(
        "an error that nobody foresaw",
        "callback.py",
        "except Exception as error:  # whatever it was, training goes on",
        "except VoidRefresh as error:",
        f"{PROBE}test_the_restoring_of_state_that_fails",
    ),
    Mutation(
        "out of memory, halve",
        "token_budget.py",
        "if not ranks.max(int(short)):",
        "if True:",
        f"{MEMORY}test_a_smaller_budget_gives_the_same_estimate_and_is_remembered",
    ),
    Mutation(
        "out of memory, void",
        "refresh.py",
        "if samples <= 1:",
        "if False:",
        f"{MEMORY}test_a_sample_that_does_not_fit_alone_voids_the_refresh",
    ),
    Mutation(
        "full disk at the journal",
        "reporting/journal.py",
        "except OSError as error:",
        "except ValueError as error:",
        f"{REPORT}test_a_full_disk_at_the_journal",
    ),
    Mutation(
        "full disk at the checkpoint",
        "callback.py",
        "except Exception as error:  # a full disk above all",
        "except OSError as error:  # a full disk above all",
        f"{REPORT}test_a_full_disk_at_the_checkpoint",
    ),
    Mutation(
        "tracker raises",
        "reporting/quiet.py",
        "        except Exception as error:",
        "        except OSError as error:",
        f"{REPORT}test_any_part_of_a_report_that_raises",
    ),
    Mutation(
        "SIGTERM in the probe",
        "scoring.py",
        "if isinstance(error, SystemExit) and raised_by_a_signal(error):",
        "if False:",
        f"{LIFE}test_sigterm_in_the_middle_of_the_probe_ends_the_run_as_the_users_handler_says",
    ),
    Mutation(
        "callback added twice",
        "attachment.py",
        "while len(places := self._places(callbacks)) > 1:",
        "while len(places := self._places(callbacks)) > 9:",
        f"{LIFE}test_the_same_callback_added_twice_acts_once",
    ),
    Mutation(
        "callback added after a resume",
        "callback.py",
        "if self._mitigator is None:  # added",
        "if False:  # added",
        f"{LIFE}test_a_guard_added_while_training_goes_on",
    ),
    Mutation(
        "exception in the user's callback",
        "callback.py",
        "self._undo()  # a train() that raised",
        "pass  # a train() that raised",
        f"{LIFE}test_an_exception_in_a_callback_of_the_user",
    ),
    Mutation(
        "guard taken off after a crash",
        "attachment.py",
        "return not self._listed or bool(self._places(self._callbacks()))",
        "return True",
        f"{LIFE}test_a_guard_taken_off_after_a_crash_turns_no_more_steps",
    ),
    Mutation(
        "evaluation on the step of a refresh",
        "isolation.py",
        "    yield _random_state()\n",
        "",
        f"{LIFE}test_evaluation_and_checkpoints_on_the_steps_of_refreshes",
    ),
    Mutation(
        "data set smaller than a refresh",
        "probe.py",
        "size = min(size, len(self))",
        "size = size",
        f"{PROBE}test_a_probe_smaller_than_a_refresh",
    ),
    Mutation(
        "kept rollouts: ratios ignored",
        "score_sums.py",
        "scores = scores[:size].mul_(ratios.to(scores)[:, None])",
        "scores = scores[:size]",
        f"{KEPT}test_each_score_is_that_of_autograd_at_the_moved_model_times_its_ratio",
    ),
    Mutation(
        "kept rollouts: a baseline that looks at its own sample",
        "importance.py",
        "baseline = positive * (num_correct - 1)",
        "baseline = positive * num_correct",
        "test_importance.py::test_unbiased_for_the_present_policy_over_all_that_the_earlier_one_can_draw",
    ),
    Mutation(
        "kept rollouts: evidence from samples that have been seen",
        "decision.py",
        "    if not fresh:",
        "    if False:",
        f"{KEPT}test_no_verdict_comes_of_samples_that_have_been_seen",
    ),
    Mutation(
        "kept rollouts: kept over a checkpoint",
        "callback.py",
        "        self._keeper.drop()\n        if state.is_world_process_zero:",
        "        if state.is_world_process_zero:",
        f"{KEPT}test_a_resumed_run_is_the_uninterrupted_one[off]",
    ),
    Mutation(
        "kept rollouts: a draw pooled with itself",
        "memory.py",
        "self.history[:-1] if probe.reused else self.history",
        "self.history",
        f"{KEPT}test_memory_pools_one_look_of_each_draw",
    ),
    Mutation(
        "kept rollouts: a floor from them",
        "floor_guard.py",
        "if probes[-1].reused:",
        "if False:",
        "test_reweighting.py::test_the_floor_moves_with_fresh_samples_and_stays_with_kept_ones",
    ),
)
