"""For each rule of rollouts that serve several refreshes what is taken away, and the test that must then fail."""

from tests.mutations.mutation import Mutation

KEPT = "test_kept_rollouts.py::"
KEPT_ROLLOUTS = (
    Mutation(
        "kept rollouts: ratios ignored",
        "unbiased for the moved policy",
        "score_sums.py",
        "scores = scores[:size].mul_(ratios.to(scores)[:, None])",
        "scores = scores[:size]",
        f"{KEPT}test_each_score_is_that_of_autograd_at_the_moved_model_times_its_ratio",
    ),
    Mutation(
        "kept rollouts: a baseline that looks at its own sample",
        "unbiased for the moved policy",
        "importance.py",
        "baseline = positive * (num_correct - 1)",
        "baseline = positive * num_correct",
        "test_importance.py::test_unbiased_for_the_present_policy_over_all_that_the_earlier_one_can_draw",
    ),
    Mutation(
        "kept rollouts: evidence from samples that have been seen",
        "nothing advances",
        "decision.py",
        "    if not fresh:",
        "    if False:",
        f"{KEPT}test_no_verdict_comes_of_samples_that_have_been_seen",
    ),
    Mutation(
        "kept rollouts: kept over a checkpoint",
        "the next refresh samples afresh",
        "callback.py",
        "        self._keeper.drop()\n        if state.is_world_process_zero:",
        "        if state.is_world_process_zero:",
        f"{KEPT}test_a_resumed_run_is_the_uninterrupted_one[off]",
    ),
    Mutation(
        "kept rollouts: a draw pooled with itself",
        "one look of each draw is pooled",
        "memory.py",
        "self.history[:-1] if probe.reused else self.history",
        "self.history",
        f"{KEPT}test_memory_pools_one_look_of_each_draw",
    ),
    Mutation(
        "kept rollouts: a pool that reaches back further",
        "as many refreshes as without reuse",
        "memory.py",
        "if self.taken[-1] - number < pool",
        "if True",
        f"{KEPT}test_memory_pools_one_look_of_each_draw",
    ),
    Mutation(
        "kept rollouts: a floor from them",
        "the floor stays",
        "floor_guard.py",
        "if probes[-1].reused:",
        "if False:",
        "test_reweighting.py::test_the_floor_moves_with_fresh_samples_and_stays_with_kept_ones",
    ),
)
