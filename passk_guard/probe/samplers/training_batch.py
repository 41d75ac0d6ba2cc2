"""The training batch itself as the probe: nothing is generated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from passk_guard.probe.records import Rollouts
from passk_guard.probe.samplers.trajectories import takes_turns
from passk_guard.utils.errors import FailedRefresh, GuardError
from passk_guard.utils.patching import Method, MethodPatch
from passk_guard.utils.private_api import is_trl, requires
from passk_guard.utils.text import Once, describe_error, one_line

logger = logging.getLogger(__name__)

OnRollouts = Callable[[Rollouts, Tensor], None]


class BatchTap:
    """Pass on each batch that a GRPOTrainer or RLOOTrainer generates for training, with its rewards.

    The estimate then describes the prompts being trained on, and not held-out ones. An exception in `on_rollouts` is
    logged, once for each reason, and training goes on.

    Args:
        trainer: a GRPOTrainer or RLOOTrainer.
        on_rollouts: called after each generation in train mode with this rank's `Rollouts` of B samples and
            rewards [B, number of reward functions], NaN where a function gave none. `prompt_index` counts over
            all ranks, since a group of completions can straddle two of them.

    Raises:
        GuardError: another trainer or an unsupported one; `install` raises it when a tap is installed already.
    """

    needs = requires(
        "trl",
        "GRPOTrainer or RLOOTrainer",
        "PassKObjective and the training batch as probe",
        "pass held-out prompts as `probe` and leave PassKObjective out",
        _calculate_rewards="rewards of the batch",
        _generate_and_score_completions="completions and advantages of the batch",
        num_generations="completions of a prompt, which stand in a row",
        reward_func_names="find the reward that means correct",
        reward_funcs="find the reward that means correct",
    )

    def __init__(self, trainer: Any, on_rollouts: OnRollouts) -> None:
        if takes_turns(trainer) and getattr(trainer.args, "mask_truncated_completions", False):
            raise GuardError(
                "Expected mask_truncated_completions=False for a training batch with tools or environments as probe; "
                "found True, which hides what the policy sampled. Pass held-out prompts as `probe`."
            )
        if is_trl(trainer):
            self.needs.check(trainer)
        self.trainer = trainer
        self.on_rollouts = on_rollouts
        self._scored: tuple[Sequence[Any], Sequence[Sequence[int]], Tensor] | None = None
        self._logged = Once()
        self._patches = [
            MethodPatch(trainer, "_calculate_rewards", self._around_rewards, owner="BatchTap"),
            MethodPatch(trainer, "_generate_and_score_completions", self._around_generation, owner="BatchTap"),
        ]

    def install(self) -> BatchTap:
        """Start listening and return self. Raises GuardError when another tap listens to this trainer."""
        for patch in self._patches:
            patch.install()
        return self

    def remove(self) -> None:
        """Stop listening and give the trainer its methods back."""
        for patch in reversed(self._patches):
            patch.remove()

    def __enter__(self) -> BatchTap:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _around_rewards(self, calculate: Method) -> Method:
        # Rewards are not in the output of the generation, and completions there are padded and masked.
        def wrapper(inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Tensor:
            rewards: Tensor = calculate(inputs, prompts, completions, completion_ids)
            self._scored = (completions, completion_ids, rewards)
            return rewards

        return wrapper

    def _around_generation(self, generate: Method) -> Method:
        def wrapper(inputs: Any) -> Any:
            training = self.trainer.model.training
            self._scored = None
            output = generate(inputs)
            if training:
                self._pass_on(inputs, output)
            self._scored = None
            return output

        return wrapper

    def _pass_on(self, inputs: Sequence[Mapping[str, Any]], output: Mapping[str, Any]) -> None:
        try:
            self.on_rollouts(*self._collect(inputs, output))
        except Exception as error:
            reason = one_line(str(error)) if isinstance(error, FailedRefresh) else describe_error(error)
            if self._logged.new(reason):
                logger.warning("passk_guard: no estimate from the training batch: %s", reason)

    def _collect(self, inputs: Sequence[Mapping[str, Any]], output: Mapping[str, Any]) -> tuple[Rollouts, Tensor]:
        if self._scored is None:
            raise FailedRefresh(f"{type(self.trainer).__name__} scored this batch without `_calculate_rewards`.")
        if output.get("num_images") is not None:
            raise FailedRefresh("the batch holds `num_images`; only text that the policy sampled can be scored.")
        completions, completion_ids, rewards = self._scored
        local, start = len(inputs), self.trainer.accelerator.process_index * len(inputs)
        group, masks = self.trainer.num_generations, output.get("tool_mask")
        environments = getattr(self.trainer, "environments", None)
        rollouts = Rollouts(
            rows=list(inputs),
            prompt_index=[(start + i) // group for i in range(local)],
            prompt_ids=_unpadded(output["prompt_ids"], output["prompt_mask"]),
            completion_ids=[list(ids) for ids in completion_ids],
            completions=list(completions),
            num_prompts=len(rewards) // group,
            temperature=float(self.trainer.temperature),
            policy_masks=None
            if masks is None
            else [mask[: len(ids)].tolist() for mask, ids in zip(masks, completion_ids, strict=True)],
            columns={} if environments is None else {"environments": list(environments)},
        )
        return rollouts, rewards[start : start + local].clone()


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Rows of ids [B, T] where mask [B, T] is not 0."""
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
